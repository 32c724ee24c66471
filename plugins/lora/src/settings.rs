//! [`PeftSettings`]: ranks and alphas that peft writes beside the tensors, as diffusers saves them.

use clearform_plugin_abi::sdk::{AdapterFile, Result};
use serde_json::{Map, Value};

/// Key under which diffusers saves peft's configuration: a JSON object, each key with the part of the pipeline in front.
const METADATA: &str = "lora_adapter_metadata";

/// peft's configuration of every part.
#[derive(Debug, Default)]
pub struct PeftSettings(Map<String, Value>);

impl PeftSettings {
    /// Reads what stands in `file`, if anything does.
    pub fn read(file: &AdapterFile) -> Result<Self> {
        match file.metadata(METADATA) {
            None => Ok(Self::default()),
            Some(text) => Self::parse(&text),
        }
    }

    fn parse(text: &str) -> Result<Self> {
        let bad = |reason: String| format!("metadata {METADATA:?}: {reason}");
        match serde_json::from_str(text).map_err(|error| bad(error.to_string()))? {
            Value::Object(map) => Ok(Self(map)),
            _ => Err(bad("expected an object".to_owned())),
        }
    }

    /// alpha / rank of `module`, or alpha / √rank where it says so (rsLoRA, arXiv 2312.03732); none where it tells no
    /// alpha.
    pub fn scale(&self, component: &str, module: &str, rank: usize) -> Option<f64> {
        let get = |key: &str| self.0.get(&format!("{component}.{key}"));
        let special = get("alpha_pattern").and_then(Value::as_object).and_then(|patterns| find(patterns, module));
        let alpha = special.or_else(|| get("lora_alpha"))?.as_f64()?;
        let rank = rank as f64;
        Some(if get("use_rslora").and_then(Value::as_bool) == Some(true) { alpha / rank.sqrt() } else { alpha / rank })
    }
}

/// The first pattern that is the end of `module`'s path, or with a ^ all of it. peft takes them for regular expressions,
/// but writes names.
fn find<'a>(patterns: &'a Map<String, Value>, module: &str) -> Option<&'a Value> {
    let fits = |pattern: &str| match pattern.strip_prefix('^') {
        Some(whole) => module == whole,
        None => module.strip_suffix(pattern).is_some_and(|rest| rest.is_empty() || rest.ends_with('.')),
    };
    patterns.iter().find(|(pattern, _)| fits(pattern)).map(|(_, value)| value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn alphas_are_those_of_peft() {
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
        assert!(PeftSettings::parse("[]").is_err());
    }
}
