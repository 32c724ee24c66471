//! [`ExpectedTensor`]: a canonical tensor that a model of given sizes must have, and the notation of shapes in
//! manifests ([`TensorRule`], [`SizeExpr`]).

use crate::manifest::block_filter::BlockFilter;
use crate::manifest::config_values::ConfigValues;
use crate::manifest::pattern::{Captures, ParameterKind, Pattern};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::fmt;

/// A canonical tensor and the shape it must have.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ExpectedTensor {
    /// Canonical name.
    pub name: String,
    /// Its shape; `None` for a dimension that may have any size.
    pub shape: Vec<Option<usize>>,
    /// Whether a model may lack it.
    pub optional: bool,
}

impl ExpectedTensor {
    /// Whether it may have the shape `shape`.
    pub fn fits(&self, shape: &[usize]) -> bool {
        let is_allowed = |(expected, found): (&Option<usize>, &usize)| expected.is_none_or(|size| size == *found);
        self.shape.len() == shape.len() && self.shape.iter().zip(shape).all(is_allowed)
    }
}

/// A dimension in a manifest: a number, a product of settings such as "3*width", or "?" for any size. For a setting
/// that is a list, `channels[n]` is the entry of the tensor's block, and `channels[first]` and `channels[last]` are its
/// ends.
#[derive(Debug, Clone, Deserialize)]
#[serde(untagged)]
pub(crate) enum SizeExpr {
    Fixed(usize),
    Product(String),
}

impl SizeExpr {
    /// Its value; `None` for any size and for settings that are unknown.
    pub fn value(&self, sizes: &ConfigValues) -> Option<usize> {
        self.value_in(None, sizes)
    }

    /// Its value in a tensor of block `number`.
    fn value_in(&self, number: Option<usize>, sizes: &ConfigValues) -> Option<usize> {
        match self {
            Self::Fixed(value) => Some(*value),
            Self::Product(product) => {
                let factor = |factor: &str| match factor.strip_suffix(']').and_then(|factor| factor.split_once('[')) {
                    Some((list, index)) => entry(sizes.list(list)?, index, number),
                    None => factor.parse().ok().or_else(|| sizes.integer(factor)),
                };
                product.split('*').try_fold(1usize, |value, name| Some(value.saturating_mul(factor(name.trim())?)))
            }
        }
    }
}

fn entry(list: &[Value], index: &str, number: Option<usize>) -> Option<usize> {
    let entry = match index {
        "first" => list.first(),
        "last" => list.last(),
        _ => list.get(number?),
    };
    entry?.as_u64().and_then(|entry| usize::try_from(entry).ok())
}

impl fmt::Display for SizeExpr {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Self::Fixed(value) => write!(f, "{value}"),
            Self::Product(product) => f.write_str(product),
        }
    }
}

/// What a linear layer or convolution is applied to, to count its operations.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
pub(crate) enum AppliedPer {
    #[serde(rename = "image token")]
    ImageToken,
    #[serde(rename = "text token")]
    TextToken,
    /// Image and text tokens alike.
    #[serde(rename = "token")]
    Token,
    #[serde(rename = "pixel")]
    Pixel,
    /// Once per image: embedders of time and class, modulation.
    #[serde(rename = "picture")]
    Image,
}

/// What the tokens of a query projection attend to. The query is as wide as all heads together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum AttendsTo {
    /// Image and text tokens to all tokens.
    All,
    /// Image tokens to image tokens.
    Image,
    /// Image tokens to text tokens.
    Text,
}

/// The tensors of one name pattern in a manifest.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct TensorRule {
    pub name: String,
    shape: Vec<SizeExpr>,
    /// A setting that must be set for the model to have the tensor: not false, null or empty.
    when: Option<String>,
    /// The range of `{m}` in the name: its first value, and the setting that it ends before.
    inner: Option<(usize, String)>,
    /// The only blocks that have the tensor: "last", or the key of a list of block numbers.
    only: Option<String>,
    /// Blocks that lack it, in the same notation.
    except: Option<String>,
    /// Whether a model may lack it.
    #[serde(default)]
    optional: bool,
    /// What it is applied to, for a linear layer or convolution.
    pub per: Option<AppliedPer>,
    /// What the tokens attend to, for a query projection.
    pub attends: Option<AttendsTo>,
}

impl TensorRule {
    /// The tensors of this pattern in a model of `sizes` with `count` blocks.
    pub fn expand(&self, sizes: &ConfigValues, count: usize) -> Vec<ExpectedTensor> {
        if self.when.as_ref().is_some_and(|key| !sizes.is_set(key)) {
            return Vec::new();
        }
        let pattern = Pattern::new(&self.name);
        let blocks = self.blocks();
        let numbers: Vec<_> = match pattern.is_numbered() {
            true => (0..count).filter(|number| blocks.contains(*number, count, sizes)).map(Some).collect(),
            false => vec![None],
        };
        let parameters = if pattern.is_layer() { &ParameterKind::ALL.map(Some)[..] } else { &[None] };
        let mut captures = Vec::new();
        for number in numbers {
            for inner in self.inner_numbers(sizes) {
                captures.extend(parameters.iter().map(|parameter| Captures { number, inner, parameter: *parameter }));
            }
        }
        captures.into_iter().map(|captures| self.fill(&pattern, captures, sizes)).collect()
    }

    /// The values of `{m}`; a single `None` if the name does not have it.
    fn inner_numbers(&self, sizes: &ConfigValues) -> impl Iterator<Item = Option<usize>> + use<> {
        let range = self.inner.as_ref().map(|(from, key)| *from..sizes.integer(key).unwrap_or(0));
        let numbers = range.clone().into_iter().flatten().map(Some);
        numbers.chain(range.is_none().then_some(None))
    }

    /// The blocks that have the tensor.
    pub fn blocks(&self) -> BlockFilter {
        BlockFilter { only: self.only.clone(), except: self.except.clone() }
    }

    /// The number of dimensions of the tensor `name`, if this is its rule.
    pub fn rank_of(&self, name: &str) -> Option<usize> {
        Some(self.rank(Pattern::new(&self.name).captures(name)?))
    }

    fn rank(&self, captures: Captures) -> usize {
        if captures.parameter == Some(ParameterKind::Bias) { 1 } else { self.shape.len() }
    }

    fn fill(&self, pattern: &Pattern, captures: Captures, sizes: &ConfigValues) -> ExpectedTensor {
        let shape =
            self.shape[..self.rank(captures)].iter().map(|size| size.value_in(captures.number, sizes)).collect();
        ExpectedTensor { name: pattern.fill(captures), shape, optional: self.optional }
    }
}
