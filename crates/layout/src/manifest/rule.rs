//! [`MappingRule`]: how tensors of a foreign layout correspond to canonical ones; [`MappingStep`]: one direction of it.

use crate::manifest::block_filter::BlockFilter;
use crate::manifest::one_or_many::OneOrMany;
use crate::manifest::pattern::Pattern;
use crate::manifest::shape::SizeExpr;
use serde::Deserialize;

/// A rule in a manifest. Besides `foreign` it has exactly one of `canonical`, `split`, `copy` and `drop`.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct RawMappingRule {
    foreign: OneOrMany,
    canonical: Option<String>,
    split: Option<Vec<String>>,
    /// The proportions of the rows in a split or join; equal by default.
    rows: Option<Vec<usize>>,
    copy: Option<Vec<String>>,
    drop: Option<String>,
    edit: Option<Reorder>,
    /// The shape in the foreign layout, if it has the same values in another shape.
    foreign_shape: Option<Vec<SizeExpr>>,
    /// The only blocks that it applies to: "last", or the key of a list of block numbers.
    only: Option<String>,
    /// Blocks that it does not apply to, in the same notation.
    except: Option<String>,
    /// Whether the foreign layout counts blocks from the end.
    #[serde(default)]
    mirrored: bool,
}

/// A reordering of values that is its own inverse.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Reorder {
    /// The second half of the rows before the first.
    SwapHalves,
    /// Rows as columns.
    Transpose,
}

/// How inputs become outputs.
#[derive(Debug, Clone)]
pub(crate) enum MappingKind {
    /// One to one, reordered and reshaped.
    Same(Option<Reorder>, Reshape),
    /// One to many: rows in these proportions.
    Split(Vec<usize>),
    /// Many to one: rows appended in these proportions, the inverse of [`Self::Split`].
    Join(Vec<usize>),
    /// One to many equal tensors, because the canonical model has in every block what the layout stores once.
    Copy,
    /// Many equal tensors to one, the inverse of [`Self::Copy`]. They are compared when the output is read: training
    /// may have changed the copies, and then the layout cannot hold the model.
    Pick,
    /// To nothing, for a reason.
    Drop(String),
}

/// The shape of the output of a one-to-one step.
#[derive(Debug, Clone)]
pub(crate) enum Reshape {
    /// The shape of the input.
    Keep,
    /// The shape of the canonical tensor in the manifest.
    Canonical,
    /// This shape.
    To(Vec<SizeExpr>),
}

/// A rule in one direction.
#[derive(Debug, Clone)]
pub(crate) struct MappingStep {
    pub inputs: Vec<Pattern>,
    pub outputs: Vec<Pattern>,
    pub kind: MappingKind,
    /// The blocks that it applies to.
    pub blocks: BlockFilter,
    /// Whether outputs count blocks from the end.
    pub mirrored: bool,
}

/// A rule in both directions.
#[derive(Debug, Clone)]
pub(crate) struct MappingRule {
    /// From the layout to canonical names.
    pub inward: MappingStep,
    /// From canonical names to the layout; `None` if the foreign tensor cannot be restored.
    pub outward: Option<MappingStep>,
}

impl MappingRule {
    /// A rule that only renames `foreign` to `canonical`.
    pub fn same(foreign: &str, canonical: &str) -> Self {
        Self::rename(vec![Pattern::new(foreign)], vec![Pattern::new(canonical)], None, None)
    }

    /// Parses a rule; the error names what is wrong with it.
    pub fn new(raw: RawMappingRule) -> Result<Self, String> {
        let foreign = patterns(raw.foreign.all());
        let names = raw.foreign.clone();
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
            _ => return Err(format!("rule for {names:?} needs exactly one of canonical, split, copy and drop")),
        };
        let rule = if raw.mirrored { rule.mirrored() } else { rule };
        rule.for_blocks(blocks).ok_or_else(|| format!("rule for {names:?}: only and except need a {{n}} on both sides"))
    }

    /// A rule that drops `foreign` for `reason`.
    pub fn drop(foreign: Vec<Pattern>, reason: String) -> Self {
        Self { inward: MappingStep::new(foreign, Vec::new(), MappingKind::Drop(reason)), outward: None }
    }

    fn mirrored(mut self) -> Self {
        self.inward.mirrored = true;
        self.outward.iter_mut().for_each(|step| step.mirrored = true);
        self
    }

    /// The same rule for `blocks` only; `None` if it has no block numbers to select by.
    fn for_blocks(mut self, blocks: BlockFilter) -> Option<Self> {
        let numbered = |patterns: &[Pattern]| !patterns.is_empty() && patterns.iter().all(Pattern::is_numbered);
        let numbered = numbered(&self.inward.inputs) && numbered(&self.inward.outputs);
        self.outward.iter_mut().for_each(|step| step.blocks = blocks.clone());
        self.inward.blocks = blocks;
        (numbered || self.inward.blocks.is_all()).then_some(self)
    }

    fn rename(
        foreign: Vec<Pattern>,
        canonical: Vec<Pattern>,
        edit: Option<Reorder>,
        shape: Option<Vec<SizeExpr>>,
    ) -> Self {
        let (inward, outward) = match shape {
            None => (Reshape::Keep, Reshape::Keep),
            Some(shape) => (Reshape::Canonical, Reshape::To(shape)),
        };
        Self::both(foreign, canonical, MappingKind::Same(edit, inward), MappingKind::Same(edit, outward))
    }

    fn both(foreign: Vec<Pattern>, canonical: Vec<Pattern>, inward: MappingKind, outward: MappingKind) -> Self {
        Self {
            inward: MappingStep::new(foreign.clone(), canonical.clone(), inward),
            outward: Some(MappingStep::new(canonical, foreign, outward)),
        }
    }
}

impl MappingStep {
    /// A step for all blocks.
    fn new(inputs: Vec<Pattern>, outputs: Vec<Pattern>, kind: MappingKind) -> Self {
        Self { inputs, outputs, kind, blocks: BlockFilter::default(), mirrored: false }
    }
}

fn patterns(names: &[String]) -> Vec<Pattern> {
    names.iter().map(|name| Pattern::new(name)).collect()
}

/// The proportions of a split or join into `count` tensors.
fn shares(rows: Option<Vec<usize>>, count: usize) -> Result<Vec<usize>, String> {
    let shares = rows.unwrap_or_else(|| vec![1; count]);
    let is_valid = shares.len() == count && count > 0 && shares.iter().all(|share| (1..1000).contains(share));
    is_valid.then_some(shares).ok_or_else(|| format!("rows must be {count} shares from 1 to 999"))
}
