//! [`PeftSettings`]: peft's configurations in an adapter_config.json beside the file, and in the file's metadata.

use crate::peft_config::{KEYS_WITH_EFFECT, PeftConfig, RankedModule, is_key};
use clearform_plugin_abi::sdk::{AdapterFile, Result};
use serde_json::{Map, Value};

/// Metadata key of the configurations that diffusers writes: a JSON object whose keys begin with the component, as
/// `transformer.lora_alpha`.
const METADATA_KEY: &str = "lora_adapter_metadata";
/// peft's keys that mark the metadata of writers who store them one by one: they state a scale.
const ALPHA_KEYS: [&str; 2] = ["lora_alpha", "alpha_pattern"];

/// peft's configurations that apply to a file.
#[derive(Debug, Default)]
pub struct PeftSettings(Vec<PeftConfig>);

/// A setting with where it comes from.
#[derive(Debug, Clone, PartialEq)]
pub struct Stated<T> {
    pub value: T,
    pub origin: String,
}

impl PeftSettings {
    /// Reads the configurations of `file`; there may be none.
    ///
    /// # Errors
    /// One is not a JSON object, has a value of the wrong type, or describes a form that is not supported.
    pub fn read(file: &AdapterFile) -> Result<Self> {
        let mut settings = Self::default();
        if let Some(text) = file.metadata(METADATA_KEY) {
            settings.add_by_component(&format!("metadata {METADATA_KEY:?}"), &text)?;
        }
        let single = KEYS_WITH_EFFECT.iter().filter_map(|key| Some(((*key).to_owned(), value(&file.metadata(key)?))));
        let single: Map<String, Value> = single.collect();
        if ALPHA_KEYS.iter().any(|key| single.contains_key(*key)) {
            settings.0.push(PeftConfig::new("the metadata".to_owned(), None, &single)?);
        }
        if let Some(text) = file.config() {
            settings.add_adapter_config(&text)?;
        }
        Ok(settings)
    }

    /// A file beside the adapter may also be the config.json of a model, which has none of peft's keys.
    fn add_adapter_config(&mut self, text: &str) -> Result<()> {
        let keys = object("adapter_config.json", text)?;
        if KEYS_WITH_EFFECT.iter().any(|key| keys.contains_key(*key)) {
            self.0.push(PeftConfig::new("adapter_config.json".to_owned(), None, &keys)?);
        }
        Ok(())
    }

    /// Adds the configurations in an object whose keys begin with a component, are objects for components, or belong
    /// to all of them.
    fn add_by_component(&mut self, origin: &str, text: &str) -> Result<()> {
        let mut components: Vec<(Option<String>, Map<String, Value>)> = Vec::new();
        let mut put = |component: Option<&str>, key: &str, value: &Value| {
            let place = components.iter().position(|(known, _)| known.as_deref() == component);
            let place = place.unwrap_or_else(|| {
                components.push((component.map(str::to_owned), Map::new()));
                components.len() - 1
            });
            components[place].1.insert(key.to_owned(), value.clone());
        };
        for (key, value) in &object(origin, text)? {
            match (key.rsplit_once('.'), value) {
                (Some((component, key)), _) => put(Some(component), key, value),
                (None, Value::Object(keys)) if !is_key(key) => {
                    keys.iter().for_each(|(inner, value)| put(Some(key.as_str()), inner, value));
                }
                (None, _) => put(None, key, value),
            }
        }
        for (component, keys) in components {
            self.0.push(PeftConfig::new(origin.to_owned(), component, &keys)?);
        }
        Ok(())
    }

    fn of<'a>(&'a self, component: &'a str) -> impl Iterator<Item = &'a PeftConfig> {
        self.0.iter().filter(move |config| config.component.as_deref().is_none_or(|known| known == component))
    }

    /// The scales of `module` with factors of `rank`, which is `None` if they have none: alpha / r, or alpha / √r with
    /// `use_rslora` (rsLoRA, arXiv 2312.03732). One of each configuration.
    ///
    /// # Errors
    /// A scale is not finite, or a pattern takes too long.
    pub fn scales(&self, component: &str, module: &str, rank: Option<usize>) -> Result<Vec<Stated<f64>>> {
        let stated = |config: &PeftConfig| -> Result<Stated<f64>> {
            let value = config.scale(module, rank).map_err(|reason| format!("{}: {reason}", config.origin))?;
            Ok(Stated { value, origin: config.origin.clone() })
        };
        self.of(component).map(stated).collect()
    }

    /// Whether the modules of `component` have magnitudes (DoRA), by each configuration that states it.
    pub fn use_dora<'a>(&'a self, component: &'a str) -> impl Iterator<Item = Stated<bool>> + 'a {
        self.of(component).filter_map(|config| Some(Stated { value: config.use_dora?, origin: config.origin.clone() }))
    }

    /// What the user should know about the settings, given the modules of the file.
    ///
    /// # Errors
    /// A pattern takes too long.
    pub fn notes(&self, modules: &[RankedModule]) -> Result<Vec<String>> {
        let mut notes = Vec::new();
        for config in &self.0 {
            let is_of = |module: &&RankedModule| config.component.as_deref().is_none_or(|own| own == module.component);
            let own: Vec<&RankedModule> = modules.iter().filter(is_of).collect();
            let found = config.notes(&own).map_err(|reason| format!("{}: {reason}", config.origin))?;
            notes.extend(found.into_iter().map(|note| format!("{}: {note}", config.origin)));
        }
        Ok(notes)
    }
}

fn object(origin: &str, text: &str) -> Result<Map<String, Value>> {
    match serde_json::from_str(text).map_err(|error| format!("{origin}: {error}"))? {
        Value::Object(map) => Ok(map),
        _ => Err(format!("{origin}: expected a JSON object")),
    }
}

/// Metadata are texts: JSON, or the value itself.
fn value(text: &str) -> Value {
    let json = if text == "True" || text == "False" { text.to_lowercase() } else { text.to_owned() };
    serde_json::from_str(&json).unwrap_or_else(|_| Value::from(text))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn by_component(text: &str) -> PeftSettings {
        let mut settings = PeftSettings::default();
        settings.add_by_component("metadata", text).unwrap();
        settings
    }

    fn config(text: &str) -> Result<PeftSettings> {
        let mut settings = PeftSettings::default();
        settings.add_adapter_config(text)?;
        Ok(settings)
    }

    fn scale(settings: &PeftSettings, component: &str, module: &str, rank: Option<usize>) -> Option<f64> {
        settings.scales(component, module, rank).unwrap().first().map(|stated| stated.value)
    }

    /// Prefixed keys, objects for components, and keys for all components.
    #[test]
    fn scales_follow_the_rules_of_peft() {
        let prefixed = r#"{"transformer.r": 4, "transformer.lora_alpha": 2, "transformer.rank_pattern": {"to_k": 2},
            "transformer.alpha_pattern": {"^proj_out": 3, "to_k": 5}, "text_encoder.r": 16,
            "text_encoder.lora_alpha": 8, "text_encoder.use_rslora": true}"#;
        let nested = r#"{"transformer": {"r": 4, "lora_alpha": 2, "rank_pattern": {"to_k": 2},
            "alpha_pattern": {"^proj_out": 3, "to_k": 5}}, "text_encoder": {"r": 16, "lora_alpha": 8, "use_rslora": true}}"#;
        for settings in [by_component(prefixed), by_component(nested)] {
            let modules =
                [("proj_out", 4, 0.75), ("a.0.proj_out", 4, 0.5), ("a.0.attn.to_k", 2, 2.5), ("add_to_k", 4, 0.5)];
            for (module, rank, expected) in modules {
                assert_eq!(scale(&settings, "transformer", module, Some(rank)), Some(expected), "{module}");
            }
            assert_eq!(scale(&settings, "text_encoder", "a", Some(16)), Some(2.0));
            assert_eq!(scale(&settings, "text_encoder_2", "a", Some(16)), None);
        }
        let all = by_component(r#"{"r": 4, "lora_alpha": 2}"#);
        assert_eq!(scale(&all, "text_encoder_2", "a", Some(4)), Some(0.5));
        // A LoKr without products has no rank of its own.
        let lokr = config(r#"{"peft_type": "LOKR", "r": 4, "alpha": 2}"#).unwrap();
        assert_eq!(scale(&lokr, "transformer", "a", None), Some(0.5));
        assert!(config(r#"{"_class_name": "FluxTransformer2DModel"}"#).unwrap().0.is_empty());
    }

    #[test]
    fn what_has_no_effect_is_named() {
        let text = r#"{"r": 4, "lora_alpha": 2, "alpha_pattern": {"to_x": 3, "to_k": 5}, "rank_pattern": {"b": 4},
            "lora_dropout": 0.1, "new_setting": true, "peft_type": "LORA"}"#;
        let module = |component, name| RankedModule { component, name, rank: Some(8) };
        let notes = config(text).unwrap().notes(&[module("transformer", "a.to_k")]).unwrap();
        assert_eq!(
            notes,
            [
                r#"adapter_config.json: rank_pattern "b" fits no module of the file"#,
                r#"adapter_config.json: alpha_pattern "to_x" fits no module of the file"#,
                r#"adapter_config.json: alpha is divided by the rank 4 for "a.to_k", whose factors have the rank 8"#,
                r#"adapter_config.json: not understood, and without effect: ["new_setting"]"#,
            ]
        );
        let other = by_component(r#"{"text_encoder.alpha_pattern": {"to_k": 3}}"#);
        assert_eq!(other.notes(&[module("transformer", "a.to_k")]).unwrap().len(), 1);
    }

    #[test]
    fn what_cannot_be_used_is_refused_by_name() {
        for (text, expected) in [
            ("[]", "adapter_config.json: expected a JSON object"),
            (r#"{"r": "x"}"#, r#"adapter_config.json: r: expected a number, found "x""#),
            (r#"{"r": 4, "use_rslora": 1}"#, "adapter_config.json: use_rslora: expected true or false, found 1"),
            (
                r#"{"r": 4, "alpha_pattern": [1]}"#,
                "alpha_pattern: expected an object of numbers by patterns, found [1]",
            ),
            (r#"{"peft_type": "OFT"}"#, r#"peft_type: expected one of ["LORA", "LOHA", "LOKR"], found "OFT""#),
            (
                r#"{"r": 4, "init_lora_weights": "pissa_niter_4"}"#,
                "\"pissa_niter_4\" also changed the weights of the base",
            ),
            (r#"{"r": 4, "layer_replication": [[0, 2]]}"#, "layer_replication: [[0,2]] is not supported"),
        ] {
            let error = config(text).unwrap_err();
            assert!(error.contains(expected), "{text}: {error}");
        }
        for text in [r#"{"r": 4, "init_lora_weights": "gaussian"}"#, r#"{"r": 4, "layer_replication": null}"#] {
            assert!(config(text).is_ok(), "{text}");
        }
        let settings = config(r#"{"r": 0, "lora_alpha": 2}"#).unwrap();
        let error = settings.scales("transformer", "a", Some(8)).unwrap_err();
        assert_eq!(error, "adapter_config.json: the scale is 2 / 0");
    }
}
