//! [`MappingRule`]: how a tensor of a foreign layout becomes canonical ones; [`MappingStep`]: the same in one direction.

use crate::manifest::block_filter::BlockFilter;
use crate::manifest::one_or_many::OneOrMany;
use crate::manifest::pattern::Pattern;
use crate::manifest::shape::Extent;
use serde::Deserialize;

/// A rule as a manifest gives it. Exactly one of `canonical`, `split`, `copy` and `drop` stands beside `foreign`.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct RawMappingRule {
    foreign: OneOrMany,
    canonical: Option<String>,
    split: Option<Vec<String>>,
    /// Shares of the rows in a split or join; equal where not given.
    rows: Option<Vec<usize>>,
    copy: Option<Vec<String>>,
    drop: Option<String>,
    edit: Option<Reorder>,
    /// Its shape in the foreign layout, where it differs in nothing else.
    foreign_shape: Option<Vec<Extent>>,
    /// Blocks that alone it is for: "last", or the key of a list of block numbers.
    only: Option<String>,
    /// Blocks that it is not for, said in the same way.
    except: Option<String>,
    /// Whether one side counts blocks from the end.
    #[serde(default)]
    mirrored: bool,
}

/// An edit of the values' order, its own inverse.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Reorder {
    /// The second half of the rows before the first.
    SwapHalves,
}

/// How inputs become outputs.
#[derive(Debug, Clone)]
pub(crate) enum MappingKind {
    /// One to one, with an edit and another shape.
    Same(Option<Reorder>, Reshape),
    /// One to many by these shares of its rows.
    Split(Vec<usize>),
    /// Many to one, one after the other by rows; each has its share.
    Join(Vec<usize>),
    /// One to many equal ones.
    Copy,
    /// Many equal ones to one.
    Pick,
    /// To nothing, for a reason.
    Drop(String),
}

/// Which shape the output of a one-to-one step takes.
#[derive(Debug, Clone)]
pub(crate) enum Reshape {
    /// That of the input.
    Keep,
    /// That which the manifest gives for the canonical tensor.
    Canonical,
    /// This one.
    To(Vec<Extent>),
}

/// A rule in one direction.
#[derive(Debug, Clone)]
pub(crate) struct MappingStep {
    pub inputs: Vec<Pattern>,
    pub outputs: Vec<Pattern>,
    pub how: MappingKind,
    /// The blocks it is for.
    pub blocks: BlockFilter,
    /// Whether outputs count blocks from the end.
    pub mirrored: bool,
}

/// A rule, both ways.
#[derive(Debug, Clone)]
pub(crate) struct MappingRule {
    pub inward: MappingStep,
    /// None where nothing canonical tells the foreign tensor.
    pub outward: Option<MappingStep>,
}

impl MappingRule {
    /// The rule that leaves the tensor `foreign` as it is, under its canonical name.
    pub fn same(foreign: &str, canonical: &str) -> Self {
        Self::rename(vec![Pattern::new(foreign)], vec![Pattern::new(canonical)], None, None)
    }

    /// Reads a rule; the error says what is wrong with it.
    pub fn new(raw: RawMappingRule) -> Result<Self, String> {
        let foreign = patterns(raw.foreign.all());
        let said = raw.foreign.clone();
        let blocks = BlockFilter { only: raw.only, except: raw.except };
        let rule = match (raw.canonical, raw.split, raw.copy, raw.drop) {
            (Some(name), None, None, None) if foreign.len() == 1 => {
                Self::rename(foreign, patterns(&[name]), raw.edit, raw.foreign_shape)
            }
            (Some(name), None, None, None) => {
                let shares = shares(raw.rows, foreign.len())?;
                Self::both(foreign, patterns(&[name]), MappingKind::Join(shares.clone()), MappingKind::Split(shares))
            }
            (None, Some(names), None, None) => {
                let shares = shares(raw.rows, names.len())?;
                Self::both(foreign, patterns(&names), MappingKind::Split(shares.clone()), MappingKind::Join(shares))
            }
            (None, None, Some(names), None) => {
                Self::both(foreign, patterns(&names), MappingKind::Copy, MappingKind::Pick)
            }
            (None, None, None, Some(reason)) => Self::drop(foreign, reason),
            _ => return Err(format!("rule for {said:?} needs exactly one of canonical, split, copy and drop")),
        };
        let rule = if raw.mirrored { rule.mirrored() } else { rule };
        rule.of(blocks).ok_or_else(|| format!("rule for {said:?}: only and except need a {{n}} on both sides"))
    }

    /// The rule that drops `foreign` for `reason`.
    pub fn drop(foreign: Vec<Pattern>, reason: String) -> Self {
        let (how, blocks) = (MappingKind::Drop(reason), BlockFilter::default());
        Self {
            inward: MappingStep { inputs: foreign, outputs: Vec::new(), how, blocks, mirrored: false },
            outward: None,
        }
    }

    fn mirrored(mut self) -> Self {
        self.inward.mirrored = true;
        self.outward.iter_mut().for_each(|step| step.mirrored = true);
        self
    }

    /// Itself for `blocks` alone; none where it has no block numbers.
    fn of(mut self, blocks: BlockFilter) -> Option<Self> {
        let numbered = |patterns: &[Pattern]| !patterns.is_empty() && patterns.iter().all(Pattern::is_numbered);
        let numbered = numbered(&self.inward.inputs) && numbered(&self.inward.outputs);
        self.outward.iter_mut().for_each(|step| step.blocks = blocks.clone());
        self.inward.blocks = blocks;
        (numbered || self.inward.blocks.are_all()).then_some(self)
    }

    fn rename(
        foreign: Vec<Pattern>,
        canonical: Vec<Pattern>,
        edit: Option<Reorder>,
        shape: Option<Vec<Extent>>,
    ) -> Self {
        let (inward, outward) = match shape {
            None => (Reshape::Keep, Reshape::Keep),
            Some(shape) => (Reshape::Canonical, Reshape::To(shape)),
        };
        Self::both(foreign, canonical, MappingKind::Same(edit, inward), MappingKind::Same(edit, outward))
    }

    fn both(foreign: Vec<Pattern>, canonical: Vec<Pattern>, inward: MappingKind, outward: MappingKind) -> Self {
        let step = |inputs: &[Pattern], outputs: &[Pattern], how| {
            let (inputs, outputs, blocks) = (inputs.to_vec(), outputs.to_vec(), BlockFilter::default());
            MappingStep { inputs, outputs, how, blocks, mirrored: false }
        };
        Self { inward: step(&foreign, &canonical, inward), outward: Some(step(&canonical, &foreign, outward)) }
    }
}

fn patterns(names: &[String]) -> Vec<Pattern> {
    names.iter().map(|name| Pattern::new(name)).collect()
}

fn shares(rows: Option<Vec<usize>>, parts: usize) -> Result<Vec<usize>, String> {
    let shares = rows.unwrap_or_else(|| vec![1; parts]);
    let whole = shares.len() == parts && parts > 0 && shares.iter().all(|share| (1..1000).contains(share));
    whole.then_some(shares).ok_or_else(|| format!("rows must give {parts} shares from 1 to 999"))
}
