//! [`PeftSettings`]: peft's configuration, which diffusers stores in the file's metadata.

use clearform_plugin_abi::sdk::{AdapterFile, Result};
use serde_json::{Map, Value};

/// Metadata key of peft's configuration: a JSON object whose keys begin with the component, as
/// `transformer.lora_alpha`.
const METADATA_KEY: &str = "lora_adapter_metadata";

/// peft's configuration of every component.
#[derive(Debug, Default)]
pub struct PeftSettings(Map<String, Value>);

impl PeftSettings {
    /// Reads the configuration from the metadata of `file`; it may be absent.
    ///
    /// # Errors
    /// It is not a JSON object.
    pub fn read(file: &AdapterFile) -> Result<Self> {
        match file.metadata(METADATA_KEY) {
            None => Ok(Self::default()),
            Some(text) => Self::parse(&text),
        }
    }

    fn parse(text: &str) -> Result<Self> {
        match serde_json::from_str(text).map_err(|error| format!("metadata {METADATA_KEY:?}: {error}"))? {
            Value::Object(map) => Ok(Self(map)),
            _ => Err(format!("metadata {METADATA_KEY:?}: expected a JSON object")),
        }
    }

    /// alpha / rank of `module`, or alpha / √rank with `use_rslora` (rsLoRA, arXiv 2312.03732); `None` without an
    /// alpha.
    pub fn scale(&self, component: &str, module: &str, rank: usize) -> Option<f64> {
        let get = |key: &str| self.0.get(&format!("{component}.{key}"));
        let patterns = get("alpha_pattern").and_then(Value::as_object);
        let specific = patterns.and_then(|patterns| matching_pattern(patterns, module));
        let alpha = specific.or_else(|| get("lora_alpha"))?.as_f64()?;
        let rank = rank as f64;
        Some(if get("use_rslora").and_then(Value::as_bool) == Some(true) { alpha / rank.sqrt() } else { alpha / rank })
    }
}

/// The value of the first pattern that is the end of `module`'s path, or with a ^ the whole path. peft reads patterns
/// as regular expressions, but writes only names.
fn matching_pattern<'a>(patterns: &'a Map<String, Value>, module: &str) -> Option<&'a Value> {
    let matches = |pattern: &str| match pattern.strip_prefix('^') {
        Some(whole) => module == whole,
        None => module.strip_suffix(pattern).is_some_and(|rest| rest.is_empty() || rest.ends_with('.')),
    };
    patterns.iter().find(|(pattern, _)| matches(pattern)).map(|(_, value)| value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn alphas_follow_the_rules_of_peft() {
        let settings = PeftSettings::parse(
            r#"{"transformer.r": 4, "transformer.lora_alpha": 2, "transformer.alpha_pattern": {"^proj_out": 3, "to_k": 5},
                "text_encoder.lora_alpha": 8, "text_encoder.use_rslora": true}"#,
        )
        .unwrap();
        for (module, rank, scale) in
            [("proj_out", 4, 0.75), ("a.0.proj_out", 4, 0.5), ("a.0.attn.to_k", 2, 2.5), ("a.0.add_to_k", 2, 1.0)]
        {
            assert_eq!(settings.scale("transformer", module, rank), Some(scale), "{module}");
        }
        assert_eq!(settings.scale("text_encoder", "a", 16), Some(2.0));
        assert_eq!(settings.scale("text_encoder_2", "a", 16), None);
        let error = PeftSettings::parse("[]").unwrap_err();
        assert_eq!(error, "metadata \"lora_adapter_metadata\": expected a JSON object");
    }
}
