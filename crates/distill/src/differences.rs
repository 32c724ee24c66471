//! Comparison of recorded settings with those of the current run, and the text that lists what differs.

use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};
use std::collections::BTreeSet;

/// Longest description of a change. Longer ones, such as lists of prompts, would bury the rest of the message.
const LONGEST: usize = 120;

/// The settings whose values differ, each as "key: recorded, now new", with nested keys as "loss.every"; empty if there are
/// none. A key that only one side has is null on the other.
pub(crate) fn differences<T: Serialize>(recorded: &T, new: &T) -> String {
    let mut lines = Vec::new();
    compare("", &to_value(recorded), &to_value(new), &mut lines);
    lines.join("; ")
}

/// `value` as it will be when it is read back from JSON. What is read from a file must be compared with this, because
/// serde_json may read a float with another last bit than was written.
pub(crate) fn read_back<T: Serialize + DeserializeOwned>(value: &T) -> serde_json::Result<T> {
    serde_json::from_str(&serde_json::to_string(value)?)
}

fn to_value<T: Serialize>(value: &T) -> Value {
    serde_json::to_value(value).unwrap_or_default()
}

fn compare(key: &str, recorded: &Value, new: &Value, lines: &mut Vec<String>) {
    match (recorded, new) {
        (Value::Object(recorded), Value::Object(new)) => compare_fields(key, recorded, new, lines),
        (recorded, new) if recorded == new => {}
        (recorded, new) => {
            let line = format!("{key}: {recorded}, now {new}");
            lines.push(if line.len() <= LONGEST { line } else { format!("{key}: changed") });
        }
    }
}

fn compare_fields(prefix: &str, recorded: &Map<String, Value>, new: &Map<String, Value>, lines: &mut Vec<String>) {
    let keys: BTreeSet<&String> = recorded.keys().chain(new.keys()).collect();
    for key in keys {
        let path = if prefix.is_empty() { key.clone() } else { format!("{prefix}.{key}") };
        compare(&path, recorded.get(key).unwrap_or(&Value::Null), new.get(key).unwrap_or(&Value::Null), lines);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn every_change_is_listed_with_its_path() {
        let recorded = json!({"steps": 3, "loss": {"every": 4, "layers": null}, "same": [1], "gone": 1});
        let new = json!({"steps": 5, "loss": {"every": 2, "layers": ["a"]}, "same": [1], "added": true});
        let wanted = "added: null, now true; gone: 1, now null; loss.every: 4, now 2; loss.layers: null, now [\"a\"]; \
                      steps: 3, now 5";
        assert_eq!(differences(&recorded, &new), wanted);
        assert_eq!(differences(&recorded, &recorded), "");
    }

    #[test]
    fn long_values_are_not_printed() {
        let prompts = |prompt: &str| json!({ "prompts": vec![prompt; 20] });
        assert_eq!(differences(&prompts("a cat"), &prompts("a dog")), "prompts: changed");
    }
}
