//! [`PeftConfig`]: one configuration of peft, what its keys mean here, and which have no effect.

use crate::patterns::ModulePatterns;
use clearform_plugin_abi::sdk::Result;
use serde_json::{Map, Value};

/// The kinds of adapters that are read, by peft's names.
const KINDS: [&str; 3] = ["LORA", "LOHA", "LOKR"];

/// peft's default of `r`, `lora_alpha` and `alpha`.
const DEFAULT: f64 = 8.0;

/// Keys that change what an adapter does.
pub const KEYS_WITH_EFFECT: [&str; 8] =
    ["lora_alpha", "alpha", "r", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "peft_type"];

/// Keys that say how an adapter was trained, initialised or stored. The tensors show to which modules it belongs.
const WITHOUT_EFFECT: &[&str] = &[
    "auto_mapping",
    "base_model_name_or_path",
    "base_model_class",
    "bias",
    "corda_config",
    "decompose_both",
    "decompose_factor",
    "ensure_weight_tying",
    "eva_config",
    "exclude_modules",
    "fan_in_fan_out",
    "inference_mode",
    "init_weights",
    "layers_pattern",
    "layers_to_transform",
    "loftq_config",
    "lora_bias",
    "lora_dropout",
    "lora_ga_config",
    "megatron_config",
    "megatron_core",
    "module_dropout",
    "modules_to_save",
    "parent_library",
    "peft_version",
    "qalora_group_size",
    "rank_dropout",
    "rank_dropout_scale",
    "revision",
    "runtime_config",
    "target_modules",
    "task_type",
    "use_effective_conv2d",
    "velora_config",
];

/// Keys of forms that compute something else if they are set.
const OTHER_FORMS: &[&str] = &[
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "layer_replication",
    "monteclora_config",
    "target_parameters",
    "trainable_token_indices",
    "use_bdlora",
    "use_qalora",
];

/// How the initialisations begin that subtract the first product from the base weights, which the file does not have.
const CHANGED_BASES: [&str; 5] = ["pissa", "olora", "corda", "loftq", "lora_ga"];

/// One configuration of peft.
#[derive(Debug, Default)]
pub struct PeftConfig {
    /// Where it is, for messages.
    pub origin: String,
    /// The component of the pipeline; `None` for all.
    pub component: Option<String>,
    rank: Option<f64>,
    alpha: Option<f64>,
    ranks: ModulePatterns,
    alphas: ModulePatterns,
    use_rslora: bool,
    pub use_dora: Option<bool>,
    /// Keys that are not understood.
    unknown: Vec<String>,
}

/// A module of the file with the rank of its factors, if they have one.
#[derive(Debug, Clone, Copy)]
pub struct RankedModule<'a> {
    pub component: &'a str,
    pub name: &'a str,
    pub rank: Option<usize>,
}

impl PeftConfig {
    /// Reads a configuration of `component`; the errors name what is wrong.
    pub fn new(origin: String, component: Option<String>, keys: &Map<String, Value>) -> Result<Self> {
        let mut config = Self { origin, component, ..Self::default() };
        for (key, value) in keys {
            config.set(key, value).map_err(|reason| format!("{}: {key}: {reason}", config.origin))?;
        }
        Ok(config)
    }

    fn set(&mut self, key: &str, value: &Value) -> Result<()> {
        match key {
            "r" => self.rank = number(value)?,
            "lora_alpha" | "alpha" => self.alpha = number(value)?,
            "rank_pattern" => self.ranks = ModulePatterns::parse(value)?,
            "alpha_pattern" => self.alphas = ModulePatterns::parse(value)?,
            "use_rslora" => self.use_rslora = flag(value)?.unwrap_or_default(),
            "use_dora" => self.use_dora = flag(value)?,
            "peft_type" => check_kind(value)?,
            "init_lora_weights" => check_initialisation(value)?,
            key if OTHER_FORMS.contains(&key) => check_unset(value)?,
            key if WITHOUT_EFFECT.contains(&key) => {}
            key => self.unknown.push(key.to_owned()),
        }
        Ok(())
    }

    /// The rank that it states for `module`.
    fn stated_rank(&self, module: &str) -> Result<Option<f64>> {
        Ok(self.ranks.value(module)?.or(self.rank))
    }

    /// The scale of `module` with factors of `rank`. peft divides by the rank that is stated, whatever the factors
    /// have.
    pub fn scale(&self, module: &str, rank: Option<usize>) -> Result<f64> {
        let rank = self.stated_rank(module)?.or(rank.map(|rank| rank as f64)).unwrap_or(DEFAULT);
        let alpha = self.alphas.value(module)?.or(self.alpha).unwrap_or(DEFAULT);
        let scale = if self.use_rslora { alpha / rank.sqrt() } else { alpha / rank };
        if scale.is_finite() { Ok(scale) } else { Err(format!("the scale is {alpha} / {rank}")) }
    }

    /// Keys that are not understood, patterns that fit none of `modules`, and ranks that their factors do not have.
    pub fn notes(&self, modules: &[&RankedModule]) -> Result<Vec<String>> {
        let names: Vec<&str> = modules.iter().map(|module| module.name).collect();
        let mut notes = Vec::new();
        for (key, patterns) in [("rank_pattern", &self.ranks), ("alpha_pattern", &self.alphas)] {
            let idle = patterns.idle(&names).map_err(|reason| format!("{key}: {reason}"))?;
            notes.extend(idle.into_iter().map(|text| format!("{key} {text:?} fits no module of the file")));
        }
        for RankedModule { name, rank, .. } in modules {
            if let (Some(stated), Some(found)) = (self.stated_rank(name)?, *rank)
                && stated != found as f64
            {
                notes.push(format!(
                    "alpha is divided by the rank {stated} for {name:?}, whose factors have the rank {found}"
                ));
            }
        }
        if !self.unknown.is_empty() {
            notes.push(format!("not understood, and without effect: {:?}", self.unknown));
        }
        Ok(notes)
    }
}

/// Whether `key` is one of peft's.
pub fn is_key(key: &str) -> bool {
    [&KEYS_WITH_EFFECT[..], WITHOUT_EFFECT, OTHER_FORMS, &["init_lora_weights"]].iter().any(|keys| keys.contains(&key))
}

fn number(value: &Value) -> Result<Option<f64>> {
    match value {
        Value::Null => Ok(None),
        value => value.as_f64().map(Some).ok_or_else(|| format!("expected a number, found {value}")),
    }
}

fn flag(value: &Value) -> Result<Option<bool>> {
    match value {
        Value::Null => Ok(None),
        value => value.as_bool().map(Some).ok_or_else(|| format!("expected true or false, found {value}")),
    }
}

fn check_kind(value: &Value) -> Result<()> {
    match value.as_str() {
        None if value.is_null() => Ok(()),
        Some(kind) if KINDS.contains(&kind) => Ok(()),
        _ => Err(format!("expected one of {KINDS:?}, found {value}: merge the adapter with peft's merge_and_unload")),
    }
}

fn check_initialisation(value: &Value) -> Result<()> {
    let changes_base = |name: &str| CHANGED_BASES.iter().any(|known| name.to_lowercase().starts_with(known));
    match value.as_str() {
        Some(name) if changes_base(name) => Err(format!(
            "{name:?} also changed the weights of the base, which the adapter does not contain: save it with peft's \
             path_initial_model_for_weight_conversion, which makes a LoRA of it"
        )),
        _ => Ok(()),
    }
}

/// A form that is not supported must not be in use.
fn check_unset(value: &Value) -> Result<()> {
    let is_set = match value {
        Value::Null | Value::Bool(false) => false,
        Value::Array(list) => !list.is_empty(),
        Value::Object(map) => !map.is_empty(),
        _ => true,
    };
    if is_set {
        Err(format!("{value} is not supported: merge the adapter with peft's merge_and_unload"))
    } else {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every key that peft writes for these kinds is known; tests/fixtures/lora/keys.py wrote the list.
    #[test]
    fn every_key_of_peft_is_known() {
        let keys: Value = serde_json::from_str(include_str!("../../../tests/fixtures/lora/peft_keys.json")).unwrap();
        for key in keys.as_array().unwrap().iter().filter_map(Value::as_str) {
            assert!(is_key(key), "{key}");
        }
    }
}
