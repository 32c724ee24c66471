//! [`ExpectedTensor`]: a canonical tensor that a model of given sizes must have, and the notation of shapes in manifests.

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
    /// Extents; none where any extent will do.
    pub shape: Vec<Option<usize>>,
    /// Whether a model may lack it.
    pub optional: bool,
}

impl ExpectedTensor {
    /// Whether `shape` will do.
    pub fn fits(&self, shape: &[usize]) -> bool {
        let fits = |(expected, found): (&Option<usize>, &usize)| expected.is_none_or(|expected| expected == *found);
        self.shape.len() == shape.len() && self.shape.iter().zip(shape).all(fits)
    }
}

/// One extent in a manifest: a number, a product such as "3*width", or "?" for any. Of a list, "channels[n]" is the entry
/// of the block, "channels[first]" and "channels[last]" those of its ends.
#[derive(Debug, Clone, Deserialize)]
#[serde(untagged)]
pub(crate) enum Extent {
    Number(usize),
    Product(String),
}

impl Extent {
    /// Its value; none where any will do. A size that is not known counts as none.
    pub fn value(&self, sizes: &ConfigValues) -> Option<usize> {
        self.value_in(None, sizes)
    }

    /// Its value in a tensor of block `number`.
    fn value_in(&self, number: Option<usize>, sizes: &ConfigValues) -> Option<usize> {
        match self {
            Self::Number(number) => Some(*number),
            Self::Product(product) => {
                let factor = |factor: &str| match factor.strip_suffix(']').and_then(|factor| factor.split_once('[')) {
                    Some((list, place)) => entry(sizes.list(list)?, place, number),
                    None => factor.parse().ok().or_else(|| sizes.number(factor)),
                };
                product.split('*').try_fold(1usize, |value, name| Some(value.saturating_mul(factor(name.trim())?)))
            }
        }
    }
}

fn entry(list: &[Value], place: &str, number: Option<usize>) -> Option<usize> {
    let entry = match place {
        "first" => list.first(),
        "last" => list.last(),
        _ => list.get(number?),
    };
    entry?.as_u64().and_then(|entry| usize::try_from(entry).ok())
}

impl fmt::Display for Extent {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Self::Number(number) => write!(f, "{number}"),
            Self::Product(product) => f.write_str(product),
        }
    }
}

/// What a linear layer or convolution acts on once.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
pub(crate) enum AppliedPer {
    #[serde(rename = "image token")]
    ImageToken,
    #[serde(rename = "text token")]
    TextToken,
    /// Of image and text.
    #[serde(rename = "token")]
    Token,
    #[serde(rename = "pixel")]
    Pixel,
    #[serde(rename = "picture")]
    Picture,
}

/// What the tokens of a query see. The layer's heads together are as wide as the query.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum AttendsTo {
    /// Image and text see each other and themselves.
    All,
    /// Image tokens see the image.
    Image,
    /// Image tokens see the text.
    Text,
}

/// Tensors of one name pattern, as a manifest gives them.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct TensorRule {
    pub name: String,
    shape: Vec<Extent>,
    /// A setting that must be set for the tensor to be there: neither false nor null nor empty.
    when: Option<String>,
    /// Where `{m}` in the name begins, and the setting that it ends before.
    inner: Option<(usize, String)>,
    /// Blocks that alone have the tensor: "last", or the key of a list of block numbers.
    only: Option<String>,
    /// Blocks that lack it, said in the same way.
    except: Option<String>,
    /// Whether a model may lack it.
    #[serde(default)]
    optional: bool,
    /// What a linear layer or convolution acts on once.
    pub per: Option<AppliedPer>,
    /// What the tokens of a query see.
    pub attends: Option<AttendsTo>,
}

impl TensorRule {
    /// The tensors of this pattern that a model of `sizes` has, of which `blocks` are numbered.
    pub fn expand(&self, sizes: &ConfigValues, blocks: usize) -> Vec<ExpectedTensor> {
        if self.when.as_ref().is_some_and(|key| !sizes.flag(key)) {
            return Vec::new();
        }
        let pattern = Pattern::new(&self.name);
        let meant = self.blocks();
        let numbers: Vec<_> = match pattern.is_numbered() {
            true => (0..blocks).filter(|number| meant.hold(*number, blocks, sizes)).map(Some).collect(),
            false => vec![None],
        };
        let parameters = if pattern.is_layer() { &ParameterKind::ALL.map(Some)[..] } else { &[None] };
        let mut captures = Vec::new();
        for (number, inner) in
            numbers.into_iter().flat_map(|number| self.inner(sizes).map(move |inner| (number, inner)))
        {
            captures.extend(parameters.iter().map(|parameter| Captures { number, inner, parameter: *parameter }));
        }
        captures.into_iter().map(|captures| self.fill(&pattern, captures, sizes)).collect()
    }

    /// Numbers within a block; one none where the name has no place for them.
    fn inner(&self, sizes: &ConfigValues) -> impl Iterator<Item = Option<usize>> + use<> {
        let range = self.inner.as_ref().map(|(from, key)| *from..sizes.number(key).unwrap_or(0));
        let numbers = range.clone().into_iter().flatten().map(Some);
        numbers.chain(range.is_none().then_some(None))
    }

    /// The blocks that have the tensor.
    pub fn blocks(&self) -> BlockFilter {
        BlockFilter { only: self.only.clone(), except: self.except.clone() }
    }

    fn fill(&self, pattern: &Pattern, captures: Captures, sizes: &ConfigValues) -> ExpectedTensor {
        let extents = if captures.parameter == Some(ParameterKind::Bias) { 1 } else { self.shape.len() };
        let shape = self.shape[..extents].iter().map(|extent| extent.value_in(captures.number, sizes)).collect();
        ExpectedTensor { name: pattern.fill(captures), shape, optional: self.optional }
    }
}
