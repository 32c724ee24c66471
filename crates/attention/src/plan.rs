//! [`AttentionPlan`]: the policy of each layer, as it is stored in clearform.toml.

use crate::fused::TiledAttention;
use crate::{Attention, AttentionError, Policy, Radius, Window, pooled_context};
use candle_core::{Device, Result, Tensor};
use clearform_ops::ProductPrecision;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::str::FromStr;

/// One policy for all layers, with exceptions by layer name. A serde value: a text if all layers have the same policy, else
/// the table that [`Self::to_toml`] writes.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "PlanForm", into = "PlanForm")]
pub struct AttentionPlan {
    default: Policy,
    layers: BTreeMap<String, Policy>,
}

impl AttentionPlan {
    /// Every layer has full attention.
    pub fn full() -> Self {
        Self::uniform(Policy::Full)
    }

    /// Every layer has CLEAR attention.
    pub fn clear(radius: Radius, pool: Option<usize>) -> Self {
        Self::uniform(Policy::Clear { radius, pool })
    }

    /// Every layer has `policy`.
    pub fn uniform(policy: Policy) -> Self {
        Self { default: policy, layers: BTreeMap::new() }
    }

    /// The same plan with another policy for `layer`, named as in the model.
    #[must_use]
    pub fn with_layer(mut self, layer: &str, policy: Policy) -> Self {
        self.layers.insert(layer.to_owned(), policy);
        self
    }

    /// The policy of `layer`, named as in the model ("transformer_blocks.0.attn").
    pub fn policy(&self, layer: &str) -> Policy {
        self.layers.get(layer).copied().unwrap_or(self.default)
    }

    /// The policy of all layers without one of their own.
    pub fn default_policy(&self) -> Policy {
        self.default
    }

    /// The layers with policies of their own.
    pub fn exceptions(&self) -> &BTreeMap<String, Policy> {
        &self.layers
    }

    /// The tensor that `layer` learns in addition to those of the teacher: its full name, and its initial value in f32.
    /// None where the policy has none.
    ///
    /// # Errors
    /// Errors of candle.
    pub fn learned(&self, layer: &str) -> Result<Option<(String, Tensor)>> {
        match self.policy(layer) {
            Policy::Clear { pool: Some(factor), .. } => {
                Ok(Some((learned_name(layer), pooled_context::initial_weight(factor, &Device::Cpu)?)))
            }
            _ => Ok(None),
        }
    }

    /// Builds the attention of `layer`. `learned` looks up a learned tensor by its full name
    /// (`LAYER.processor.spatial_weight`); a missing one gets its initial value.
    ///
    /// # Errors
    /// A learned tensor of the wrong shape.
    pub fn build(
        &self,
        layer: &str,
        learned: &dyn Fn(&str) -> Result<Option<Tensor>>,
        products: ProductPrecision,
    ) -> Result<Box<dyn Attention>> {
        let pool = match self.learned(layer)? {
            None => None,
            Some((name, initial)) => Some(checked(learned(&name)?, initial, &name)?),
        };
        let radius = match self.policy(layer) {
            Policy::Full => None,
            Policy::Clear { radius, .. } => Some(radius),
        };
        Ok(Box::new(TiledAttention::new(Window { radius, pool }).with_products(products)))
    }

    /// Refuses a plan that names a layer which is none of `layers`, those of a model.
    ///
    /// # Errors
    /// [`AttentionError::UnknownLayer`] for the first such layer.
    pub fn check_layers(&self, layers: &BTreeSet<String>) -> std::result::Result<(), AttentionError> {
        match self.layers.keys().find(|layer| !layers.contains(*layer)) {
            None => Ok(()),
            Some(layer) => Err(AttentionError::UnknownLayer {
                layer: layer.clone(),
                count: layers.len(),
                example: layers.first().cloned().unwrap_or_default(),
            }),
        }
    }

    /// Parses `default = "clear:r=16"` and a table `[layers]` of names and policies.
    ///
    /// # Errors
    /// Invalid TOML, an unknown key, or an invalid policy.
    pub fn from_toml(text: &str) -> std::result::Result<Self, AttentionError> {
        let table: PlanTable = toml::from_str(text).map_err(|error| AttentionError::BadToml(error.to_string()))?;
        table.plan()
    }

    /// The inverse of [`Self::from_toml`].
    pub fn to_toml(&self) -> String {
        // Strings and a table of strings can always be written as TOML.
        toml::to_string(&PlanTable::of(self)).unwrap_or_default()
    }
}

/// Parses the value of `--attention`: the same policy for every layer.
impl FromStr for AttentionPlan {
    type Err = AttentionError;

    fn from_str(text: &str) -> std::result::Result<Self, AttentionError> {
        text.parse().map(Self::uniform)
    }
}

/// The inverse of [`FromStr`] if no layer has its own policy; otherwise the default and the number of layers that do.
impl fmt::Display for AttentionPlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.layers.len() {
            0 => self.default.fmt(f),
            1 => write!(f, "{} (1 layer has its own)", self.default),
            count => write!(f, "{} ({count} layers have their own)", self.default),
        }
    }
}

/// A plan as it is written.
#[derive(Serialize, Deserialize)]
#[serde(untagged)]
enum PlanForm {
    Uniform(String),
    Table(PlanTable),
}

impl TryFrom<PlanForm> for AttentionPlan {
    type Error = AttentionError;

    fn try_from(form: PlanForm) -> std::result::Result<Self, AttentionError> {
        match form {
            PlanForm::Uniform(text) => text.parse(),
            PlanForm::Table(table) => table.plan(),
        }
    }
}

impl From<AttentionPlan> for PlanForm {
    fn from(plan: AttentionPlan) -> Self {
        match plan.layers.is_empty() {
            true => Self::Uniform(plan.default.to_string()),
            false => Self::Table(PlanTable::of(&plan)),
        }
    }
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct PlanTable {
    default: String,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    layers: BTreeMap<String, String>,
}

impl PlanTable {
    fn of(plan: &AttentionPlan) -> Self {
        let layers = plan.layers.iter().map(|(layer, policy)| (layer.clone(), policy.to_string())).collect();
        Self { default: plan.default.to_string(), layers }
    }

    fn plan(self) -> std::result::Result<AttentionPlan, AttentionError> {
        let parse = |(layer, policy): (String, String)| Ok((layer, policy.parse()?));
        let layers = self.layers.into_iter().map(parse).collect::<std::result::Result<_, AttentionError>>()?;
        Ok(AttentionPlan { default: self.default.parse()?, layers })
    }
}

/// How the name of a learned tensor ends, as CLEAR's authors have it.
const LEARNED: &str = ".processor.spatial_weight";

fn learned_name(layer: &str) -> String {
    format!("{layer}{LEARNED}")
}

/// The layer that learns the tensor `name`; `None` if the teacher has that tensor too.
pub fn learning_layer(name: &str) -> Option<&str> {
    name.strip_suffix(LEARNED)
}

fn checked(found: Option<Tensor>, initial: Tensor, name: &str) -> Result<Tensor> {
    match found {
        None => Ok(initial),
        Some(found) if found.dims() == initial.dims() => Ok(found),
        Some(found) => candle_core::bail!(
            "tensor {name:?} has shape {:?}, but the attention plan requires {:?}; pass the plan it was distilled with",
            found.dims(),
            initial.dims()
        ),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    const LAYER: &str = "transformer_blocks.0.attn";

    #[test]
    fn toml_reads_back() {
        let text = "default = \"clear:r=16,d=4\"\n\n[layers]\n\"transformer_blocks.0.attn\" = \"full\"\n";
        let plan = AttentionPlan::from_toml(text).unwrap();
        assert_eq!(plan.policy(LAYER), Policy::Full);
        assert_eq!(plan.policy("single_transformer_blocks.0.attn").to_string(), "clear:r=16,d=4");
        assert_eq!(plan.to_toml(), text);
        assert_eq!(plan, AttentionPlan::from_toml(&plan.to_toml()).unwrap());
        assert_eq!(AttentionPlan::full().to_toml(), "default = \"full\"\n");
    }

    #[test]
    fn wrong_toml_is_an_error() {
        for text in [
            "",
            "default = 3",
            "default = \"full\"\nlayer = 1",
            "default = \"clear\"",
            "default = \"full\"\n[layers]\na = \"b\"",
        ] {
            assert!(AttentionPlan::from_toml(text).is_err(), "{text:?}");
        }
    }

    #[test]
    fn one_word_is_a_plan() {
        for text in ["full", "clear:r=8", "clear:r=2.5,d=4"] {
            assert_eq!(text.parse::<AttentionPlan>().unwrap().to_string(), text);
        }
        let plan = AttentionPlan::full().with_layer(LAYER, "clear:r=8".parse().unwrap());
        assert_eq!(plan.to_string(), "full (1 layer has its own)");
    }

    #[test]
    fn only_pooled_context_is_learned() {
        let plan = AttentionPlan::clear(Radius::new(8.0).unwrap(), Some(4));
        let (name, initial) = plan.learned(LAYER).unwrap().unwrap();
        assert_eq!(name, "transformer_blocks.0.attn.processor.spatial_weight");
        assert_eq!(initial.dims(), [1, 1, 1, 4, 1, 4, 1]);
        assert_eq!(initial.flatten_all().unwrap().to_vec1::<f32>().unwrap(), [1.0 / 16.0; 16]);
        assert!(AttentionPlan::full().learned(LAYER).unwrap().is_none());
    }

    #[test]
    fn a_learned_tensor_of_another_shape_is_an_error() {
        let plan = AttentionPlan::clear(Radius::new(8.0).unwrap(), Some(4));
        let wrong = |_: &str| pooled_context::initial_weight(2, &Device::Cpu).map(Some);
        let error = plan.build(LAYER, &wrong, ProductPrecision::Full).err().unwrap().to_string();
        assert!(error.contains("processor.spatial_weight") && error.contains("[1, 1, 1, 4, 1, 4, 1]"), "{error}");
    }
}
