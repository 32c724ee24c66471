//! [`Policy`]: what a layer's image tokens see, and [`POLICIES`], the forms in which it is written.
//!
//! A further policy is a file in policies/ with its form, a line in [`POLICIES`], and a variant where it says something
//! new.

mod clear;
mod full;

use crate::{AttentionError, Radius};
use std::fmt;
use std::str::FromStr;

/// What a layer's image tokens see of the image. Text is seen by all, and sees all.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Policy {
    /// Every token.
    Full,
    /// The disc of a radius and, if asked for, the whole image averaged over d × d cells.
    Clear {
        /// Radius of the disc.
        radius: Radius,
        /// Edge d of a pooled cell.
        pool: Option<usize>,
    },
}

/// Settings of a policy as they are written, key by key.
type PolicySettings<'a> = &'a [(&'a str, &'a str)];

/// How a policy is written: a name, or a name, a colon and its settings.
#[derive(Debug, Clone, Copy)]
pub struct PolicyForm {
    /// What stands before the colon.
    pub name: &'static str,
    /// The whole form, for messages.
    pub usage: &'static str,
    /// Reads the settings; gives the reason where they are none.
    parse: fn(PolicySettings<'_>) -> Result<Policy, String>,
    /// Writes a policy of this form; none for those of another.
    write: fn(&Policy) -> Option<String>,
}

/// Every form, alphabetically.
pub const POLICIES: &[PolicyForm] = &[clear::FORM, full::FORM];

impl FromStr for Policy {
    type Err = AttentionError;

    fn from_str(text: &str) -> Result<Self, AttentionError> {
        let bad = |reason: String| AttentionError::BadPlan { text: text.to_owned(), reason };
        let (name, settings) = text.trim().split_once(':').unwrap_or((text.trim(), ""));
        let Some(form) = POLICIES.iter().find(|form| form.name == name) else {
            let usages: Vec<&str> = POLICIES.iter().map(|form| form.usage).collect();
            return Err(bad(format!("expected {}", usages.join(" or "))));
        };
        let explain = |reason: String| bad(format!("{reason}; expected {}", form.usage));
        let settings = pairs(settings).map_err(explain)?;
        (form.parse)(&settings).map_err(explain)
    }
}

impl fmt::Display for Policy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        POLICIES.iter().find_map(|form| (form.write)(self)).unwrap_or_default().fmt(f)
    }
}

/// "a=1,b=2" as pairs, each key once.
fn pairs(settings: &str) -> Result<Vec<(&str, &str)>, String> {
    let mut pairs: Vec<(&str, &str)> = Vec::new();
    for setting in settings.split(',').filter(|_| !settings.trim().is_empty()) {
        let (key, value) = setting.split_once('=').ok_or_else(|| format!("{setting:?} is no key=value"))?;
        let (key, value) = (key.trim(), value.trim());
        if pairs.iter().any(|(other, _)| *other == key) {
            return Err(format!("{key:?} is given twice"));
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
    fn what_is_written_reads_back() {
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
    fn what_is_wrong_says_why() {
        let cases = [
            ("", "expected clear:r=R[,d=D] or full"),
            ("CLEAR:r=4", "expected clear:r=R[,d=D] or full"),
            ("full:r=4", "\"r\" is no setting of it; expected full"),
            ("clear", "r is missing; expected clear:r=R[,d=D]"),
            ("clear:r", "\"r\" is no key=value"),
            ("clear:r=x", "r=\"x\" is no number"),
            ("clear:r=0", "radius 0: expected a finite number above 0"),
            ("clear:r=inf", "radius inf: expected a finite number above 0"),
            ("clear:r=NaN", "radius NaN: expected a finite number above 0"),
            ("clear:r=4,r=5", "\"r\" is given twice"),
            ("clear:r=4,d=0", "d=\"0\" is no whole number from 2 to 256"),
            ("clear:r=4,d=100000", "d=\"100000\" is no whole number from 2 to 256"),
            ("clear:r=4,q=1", "\"q\" is no setting of it"),
        ];
        for (text, reason) in cases {
            let error = text.parse::<Policy>().unwrap_err().to_string();
            assert!(error.contains(reason), "{text:?}: {error}");
        }
    }
}
