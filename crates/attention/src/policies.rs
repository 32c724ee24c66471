//! [`Policy`]: what the image tokens of a layer attend to, and [`POLICIES`], its text forms.
//!
//! A new policy is a file in policies/ with its form, a line in [`POLICIES`], and a variant of [`Policy`].

mod clear;
mod full;

use crate::{AttentionError, Radius};
use std::fmt;
use std::str::FromStr;

/// What the image tokens of a layer attend to in the image. Text attends to everything, and everything attends to text.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Policy {
    /// Every token.
    Full,
    /// A disc and, optionally, the whole image averaged over d × d cells.
    Clear {
        /// Radius of the disc.
        radius: Radius,
        /// Side d of a pooled cell.
        pool: Option<usize>,
    },
}

/// Settings of a policy as (key, value).
type PolicySettings<'a> = &'a [(&'a str, &'a str)];

/// The text form of a policy: a name, optionally with a colon and settings.
#[derive(Debug, Clone, Copy)]
pub struct PolicyForm {
    /// The part before the colon.
    pub name: &'static str,
    /// The whole form, for messages.
    pub usage: &'static str,
    /// Parses the settings, or returns the reason why they are invalid.
    parse: fn(PolicySettings<'_>) -> Result<Policy, String>,
    /// Writes a policy of this form; none for other policies.
    write: fn(&Policy) -> Option<String>,
}

/// Every form in alphabetical order.
pub const POLICIES: &[PolicyForm] = &[clear::FORM, full::FORM];

impl FromStr for Policy {
    type Err = AttentionError;

    fn from_str(text: &str) -> Result<Self, AttentionError> {
        let invalid = |reason: String| AttentionError::BadPlan { text: text.to_owned(), reason };
        let (name, settings) = text.trim().split_once(':').unwrap_or((text.trim(), ""));
        let Some(form) = POLICIES.iter().find(|form| form.name == name) else {
            let usages: Vec<&str> = POLICIES.iter().map(|form| form.usage).collect();
            return Err(invalid(format!("expected {}", usages.join(" or "))));
        };
        let with_usage = |reason: String| invalid(format!("{reason}; expected {}", form.usage));
        let settings = split_settings(settings).map_err(with_usage)?;
        (form.parse)(&settings).map_err(with_usage)
    }
}

impl fmt::Display for Policy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        POLICIES.iter().find_map(|form| (form.write)(self)).unwrap_or_default().fmt(f)
    }
}

/// Splits "a=1,b=2" into pairs; each key may occur once.
fn split_settings(settings: &str) -> Result<Vec<(&str, &str)>, String> {
    let mut pairs: Vec<(&str, &str)> = Vec::new();
    for setting in settings.split(',').filter(|_| !settings.trim().is_empty()) {
        let (key, value) = setting.split_once('=').ok_or_else(|| format!("expected key=value, found {setting:?}"))?;
        let key = key.trim();
        let value = value.trim();
        if pairs.iter().any(|(other, _)| *other == key) {
            return Err(format!("{key:?} is set twice"));
        }
        pairs.push((key, value));
    }
    Ok(pairs)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn clear(radius: f64, pool: Option<usize>) -> Policy {
        Policy::Clear { radius: Radius::new(radius).unwrap(), pool }
    }

    #[test]
    fn written_policies_parse_back() {
        let cases = [
            ("full", Policy::Full),
            ("clear:r=16", clear(16.0, None)),
            ("clear:r=4.5", clear(4.5, None)),
            ("clear:r=8,d=4", clear(8.0, Some(4))),
        ];
        for (text, policy) in cases {
            assert_eq!(text.parse::<Policy>().unwrap(), policy);
            assert_eq!(policy.to_string(), text);
        }
        assert_eq!(" clear: d=4, r=8 ".parse::<Policy>().unwrap(), clear(8.0, Some(4)));
    }

    #[test]
    fn invalid_policies_are_refused_with_the_reason() {
        let cases = [
            ("", "expected clear:r=R[,d=D] or full"),
            ("CLEAR:r=4", "expected clear:r=R[,d=D] or full"),
            ("full:r=4", "unknown setting \"r\"; expected full"),
            ("clear", "r is missing; expected clear:r=R[,d=D]"),
            ("clear:r", "expected key=value, found \"r\""),
            ("clear:r=x", "r=\"x\" is not a number"),
            ("clear:r=0", "radius 0: expected a finite number above 0"),
            ("clear:r=inf", "radius inf: expected a finite number above 0"),
            ("clear:r=NaN", "radius NaN: expected a finite number above 0"),
            ("clear:r=4,r=5", "\"r\" is set twice"),
            ("clear:r=4,d=0", "d=\"0\" is not an integer from 2 to 256"),
            ("clear:r=4,d=100000", "d=\"100000\" is not an integer from 2 to 256"),
            ("clear:r=4,q=1", "unknown setting \"q\""),
        ];
        for (text, reason) in cases {
            let error = text.parse::<Policy>().unwrap_err().to_string();
            assert!(error.contains(reason), "{text:?}: {error}");
        }
    }
}
