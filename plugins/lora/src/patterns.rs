//! [`ModulePatterns`]: values by patterns of module names, peft's `rank_pattern` and `alpha_pattern`.

use clearform_plugin_abi::sdk::Result;
use fancy_regex::Regex;
use serde_json::Value;

/// Values by regular expressions. The first that fits a module counts.
#[derive(Debug, Default)]
pub struct ModulePatterns(Vec<ModulePattern>);

#[derive(Debug)]
struct ModulePattern {
    text: String,
    regex: Regex,
    value: f64,
}

impl ModulePatterns {
    /// Reads a JSON object of numbers by patterns; null is none.
    ///
    /// # Errors
    /// It is something else, or a pattern is not a regular expression.
    pub fn parse(json: &Value) -> Result<Self> {
        match json {
            Value::Null => Ok(Self::default()),
            Value::Object(map) => map.iter().map(|(text, value)| ModulePattern::new(text, value)).collect(),
            other => Err(format!("expected an object of numbers by patterns, found {other}")),
        }
    }

    /// The value of the first pattern that fits `module`.
    ///
    /// # Errors
    /// A pattern takes too long.
    pub fn value(&self, module: &str) -> Result<Option<f64>> {
        for pattern in &self.0 {
            if pattern.fits(module)? {
                return Ok(Some(pattern.value));
            }
        }
        Ok(None)
    }

    /// The patterns that fit none of `modules`.
    ///
    /// # Errors
    /// As [`Self::value`].
    pub fn idle(&self, modules: &[&str]) -> Result<Vec<&str>> {
        let mut idle = Vec::new();
        for pattern in &self.0 {
            let fits: Vec<bool> = modules.iter().map(|module| pattern.fits(module)).collect::<Result<_>>()?;
            if !fits.contains(&true) {
                idle.push(pattern.text.as_str());
            }
        }
        Ok(idle)
    }
}

impl FromIterator<ModulePattern> for ModulePatterns {
    fn from_iter<I: IntoIterator<Item = ModulePattern>>(patterns: I) -> Self {
        Self(patterns.into_iter().collect())
    }
}

impl ModulePattern {
    /// peft's rule: `re.match(r"(.*\.)?(KEY)$", module)`.
    fn new(text: &str, value: &Value) -> Result<Self> {
        let expected = || format!("{text:?}: expected a number, found {value}");
        let value = value.as_f64().ok_or_else(expected)?;
        let regex = Regex::new(&format!(r"^(.*\.)?({})$", from_python(text)));
        let regex = regex.map_err(|error| format!("{text:?} is not a regular expression: {error}"))?;
        Ok(Self { text: text.to_owned(), regex, value })
    }

    fn fits(&self, module: &str) -> Result<bool> {
        self.regex.is_match(module).map_err(|error| format!("{:?}: {error}", self.text))
    }
}

/// A regular expression of Python in this engine's syntax, which has operators between characters of a class that
/// Python takes literally, and no quantifier without a lower bound.
fn from_python(text: &str) -> String {
    let mut converted = String::with_capacity(text.len());
    let mut in_class = false;
    let mut letters = text.chars().peekable();
    while let Some(letter) = letters.next() {
        match (in_class, letter, letters.peek()) {
            (_, '\\', Some(_)) => {
                converted.push(letter);
                converted.extend(letters.next());
            }
            (true, '[', _) => converted.push_str(r"\["),
            (true, '&' | '~', Some(next)) if *next == letter => {}
            (true, ']', _) => {
                in_class = false;
                converted.push(letter);
            }
            (false, '[', _) => {
                in_class = true;
                converted.push(letter);
                converted.extend(letters.next_if_eq(&'^'));
                converted.extend(letters.next_if_eq(&']'));
            }
            (false, '{', Some(',')) => converted.push_str("{0"),
            _ => converted.push(letter),
        }
    }
    converted
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every pattern with every name, as Python's `re` matches them; tests/fixtures/lora/patterns.py wrote the table.
    #[test]
    fn patterns_fit_the_names_that_python_finds() {
        let table = include_str!("../../../tests/fixtures/lora/patterns.json");
        let table: Value = serde_json::from_str(table).unwrap();
        let names: Vec<&str> = table["names"].as_array().unwrap().iter().map(|name| name.as_str().unwrap()).collect();
        let patterns = table["patterns"].as_object().unwrap();
        assert!(patterns.len() > 60 && names.len() > 20, "{} {}", patterns.len(), names.len());
        for (text, fitting) in patterns {
            let pattern = ModulePattern::new(text, &Value::from(1)).unwrap_or_else(|error| panic!("{error}"));
            let found: Vec<Value> =
                (0..names.len()).filter(|index| pattern.fits(names[*index]).unwrap()).map(Value::from).collect();
            assert_eq!(&Value::from(found), fitting, "{text}");
        }
    }

    #[test]
    fn the_first_pattern_that_fits_counts() {
        let patterns: Value = serde_json::from_str(r#"{"to_q": 8, "attn.to_q": 16, "to_[kv]": 2, "proj": 3}"#).unwrap();
        let patterns = ModulePatterns::parse(&patterns).unwrap();
        let value = |module: &str| patterns.value(module).unwrap();
        assert_eq!([value("a.attn.to_q"), value("a.to_v"), value("a.proj_out")], [Some(8.0), Some(2.0), None]);
        assert_eq!(patterns.idle(&["a.attn.to_q", "to_k"]).unwrap(), ["proj"]);
        assert!(ModulePatterns::parse(&Value::Null).unwrap().idle(&[]).unwrap().is_empty());
    }

    #[test]
    fn what_is_no_pattern_is_named() {
        let error = |text: &str| ModulePatterns::parse(&serde_json::from_str(text).unwrap()).unwrap_err();
        assert_eq!(error("[1]"), "expected an object of numbers by patterns, found [1]");
        assert_eq!(error(r#"{"to_q": "x"}"#), r#""to_q": expected a number, found "x""#);
        assert!(error(r#"{"to_(q": 1}"#).starts_with(r#""to_(q" is not a regular expression: "#));
    }
}
