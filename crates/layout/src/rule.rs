//! [`Rule`]: how a tensor of a foreign layout becomes canonical ones; [`Step`]: the same in one direction.

use crate::pattern::Pattern;
use crate::shape::Extent;
use serde::Deserialize;

/// A rule as a manifest gives it. Exactly one of `canonical`, `split`, `copy` and `drop` stands beside `foreign`.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct RawRule {
    foreign: OneOrMany,
    canonical: Option<String>,
    split: Option<Vec<String>>,
    /// Shares of the rows in a split or join; equal where not given.
    rows: Option<Vec<usize>>,
    copy: Option<Vec<String>>,
    drop: Option<String>,
    edit: Option<Edit>,
    /// Its shape in the foreign layout, where it differs in nothing else.
    foreign_shape: Option<Vec<Extent>>,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(untagged)]
enum OneOrMany {
    One(String),
    Many(Vec<String>),
}

/// An edit of the values' order, its own inverse.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Edit {
    /// The second half of the rows before the first.
    SwapHalves,
}

/// How inputs become outputs.
#[derive(Debug, Clone)]
pub(crate) enum How {
    /// One to one, with an edit and another shape.
    Same(Option<Edit>, Reshape),
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
pub(crate) struct Step {
    pub inputs: Vec<Pattern>,
    pub outputs: Vec<Pattern>,
    pub how: How,
}

/// A rule, both ways.
#[derive(Debug, Clone)]
pub(crate) struct Rule {
    pub inward: Step,
    /// None where nothing canonical tells the foreign tensor.
    pub outward: Option<Step>,
}

impl Rule {
    /// The rule that leaves `name` as it is.
    pub fn identity(name: &str) -> Self {
        let names = vec![Pattern::new(name)];
        let step = Step { inputs: names.clone(), outputs: names, how: How::Same(None, Reshape::Keep) };
        Self { inward: step.clone(), outward: Some(step) }
    }

    /// Reads a rule; the error says what is wrong with it.
    pub fn new(raw: RawRule) -> Result<Self, String> {
        let foreign = match &raw.foreign {
            OneOrMany::One(name) => patterns(std::slice::from_ref(name)),
            OneOrMany::Many(names) => patterns(names),
        };
        let said = raw.foreign.clone();
        let rule = match (raw.canonical, raw.split, raw.copy, raw.drop) {
            (Some(name), None, None, None) if foreign.len() == 1 => {
                Self::rename(foreign, patterns(&[name]), raw.edit, raw.foreign_shape)
            }
            (Some(name), None, None, None) => {
                let shares = shares(raw.rows, foreign.len())?;
                Self::both(foreign, patterns(&[name]), How::Join(shares.clone()), How::Split(shares))
            }
            (None, Some(names), None, None) => {
                let shares = shares(raw.rows, names.len())?;
                Self::both(foreign, patterns(&names), How::Split(shares.clone()), How::Join(shares))
            }
            (None, None, Some(names), None) => Self::both(foreign, patterns(&names), How::Copy, How::Pick),
            (None, None, None, Some(reason)) => {
                Self { inward: Step { inputs: foreign, outputs: Vec::new(), how: How::Drop(reason) }, outward: None }
            }
            _ => return Err(format!("rule for {said:?} needs exactly one of canonical, split, copy and drop")),
        };
        Ok(rule)
    }

    fn rename(foreign: Vec<Pattern>, canonical: Vec<Pattern>, edit: Option<Edit>, shape: Option<Vec<Extent>>) -> Self {
        let (inward, outward) = match shape {
            None => (Reshape::Keep, Reshape::Keep),
            Some(shape) => (Reshape::Canonical, Reshape::To(shape)),
        };
        Self::both(foreign, canonical, How::Same(edit, inward), How::Same(edit, outward))
    }

    fn both(foreign: Vec<Pattern>, canonical: Vec<Pattern>, inward: How, outward: How) -> Self {
        let outward = Step { inputs: canonical.clone(), outputs: foreign.clone(), how: outward };
        Self { inward: Step { inputs: foreign, outputs: canonical, how: inward }, outward: Some(outward) }
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
