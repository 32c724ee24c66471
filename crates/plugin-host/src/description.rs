//! [`Description`]: what a library says of itself, read from its file. Nothing is loaded for it.

use clearform_layout::glob;
use clearform_plugin_abi::{DESCRIPTION_BEGIN, DESCRIPTION_END};
use memchr::memmem::find;
use serde::Deserialize;
use std::collections::{BTreeMap, BTreeSet};

/// Descriptions are short; a longer one is no description.
const LONGEST: usize = 1 << 16;

/// A plugin's description, as TOML embedded in its library.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Description {
    /// Name that `--adapter FILE,plugin=ID` takes.
    pub id: String,
    /// Its own version.
    pub version: String,
    /// Interface with its revision.
    pub interface: String,
    /// Major version of the boundary.
    pub abi: u32,
    /// What it is for, in a line.
    pub summary: String,
    /// What it opens: a file that any of these fits.
    pub claims: Vec<FileClaim>,
    /// Small files that it must open, for `plugins check`.
    #[serde(default, rename = "example")]
    pub examples: Vec<Example>,
}

/// Patterns of tensor names and of metadata; `*` stands for any text.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct FileClaim {
    /// One of these is there.
    pub any: Vec<String>,
    /// All of these are.
    pub all: Vec<String>,
    /// None of these is.
    pub none: Vec<String>,
    /// These keys have values that fit.
    pub metadata: BTreeMap<String, String>,
}

/// A file in small, and what the plugin must make of it.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Example {
    /// What it shows.
    pub name: String,
    /// Extents of each tensor.
    pub tensors: BTreeMap<String, Vec<usize>>,
    /// What the file holds beside them.
    #[serde(default)]
    pub metadata: BTreeMap<String, String>,
    /// An adapter's edits, in order: `component.parameter`.
    #[serde(default)]
    pub edits: Vec<String>,
    /// A branch's base: its family, and its config.json as a table.
    pub base: Option<ExampleBase>,
    /// One evaluation of a branch.
    pub step: Option<ExampleStep>,
}

/// One evaluation of a branch, by the extents of its inputs.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ExampleStep {
    /// Rows and columns of the image tokens.
    pub grid: [usize; 2],
    /// Channels of a latent token.
    pub channels: usize,
    /// Tokens and channels of the text.
    pub text: [usize; 2],
    /// Channels of the pooled text.
    pub pooled: usize,
    /// Extents of the control.
    pub control: Vec<usize>,
    /// The blocks of each residual, in order.
    pub residuals: Vec<Vec<usize>>,
}

/// The model that an example's branch hangs on.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ExampleBase {
    /// Its family.
    pub family: String,
    /// Its config.json.
    pub config: toml::Table,
}

impl Description {
    /// The description in the bytes of a library's file, if there is one; an error if there is one that cannot be read.
    pub fn find(library: &[u8]) -> Option<Result<Self, String>> {
        let begin = find(library, DESCRIPTION_BEGIN.as_bytes())? + DESCRIPTION_BEGIN.len();
        let rest = &library[begin..library.len().min(begin + LONGEST)];
        let end = find(rest, DESCRIPTION_END.as_bytes())?;
        let text = std::str::from_utf8(&rest[..end]).map_err(|_| "its description is no UTF-8".to_owned());
        Some(text.and_then(|text| toml::from_str(text).map_err(|error| format!("its description: {error}"))))
    }

    /// Whether a file of these tensor `names` and this `metadata` is one of its own.
    pub fn claims(&self, names: &BTreeSet<&str>, metadata: &BTreeMap<String, String>) -> bool {
        self.claims.iter().any(|claim| claim.fits(names, metadata))
    }
}

impl FileClaim {
    fn fits(&self, names: &BTreeSet<&str>, metadata: &BTreeMap<String, String>) -> bool {
        let there = |pattern: &String| names.iter().any(|name| glob(pattern, name));
        let told = |(key, pattern): (&String, &String)| metadata.get(key).is_some_and(|value| glob(pattern, value));
        let says_something = !(self.any.is_empty() && self.all.is_empty() && self.metadata.is_empty());
        says_something
            && (self.any.is_empty() || self.any.iter().any(there))
            && self.all.iter().all(there)
            && !self.none.iter().any(there)
            && self.metadata.iter().all(told)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    const TEXT: &str = r#"
        id = "scale"
        version = "1.0"
        interface = "clearform.adapter/1"
        abi = 1
        summary = "Scales"
        [[claims]]
        any = ["*.scale"]
        none = ["*.shift"]
        [[claims]]
        metadata = { kind = "sc*" }
    "#;

    #[test]
    fn a_description_is_found_among_other_bytes() {
        let library =
            [b"\x7fELF\0junk", DESCRIPTION_BEGIN.as_bytes(), TEXT.as_bytes(), DESCRIPTION_END.as_bytes(), b"\0"];
        let description = Description::find(&library.concat()).unwrap().unwrap();
        assert_eq!((description.id.as_str(), description.abi, description.claims.len()), ("scale", 1, 2));
        assert!(Description::find(b"\x7fELF\0junk").is_none());
        let broken = [DESCRIPTION_BEGIN.as_bytes(), b"id = 3", DESCRIPTION_END.as_bytes()].concat();
        assert!(Description::find(&broken).unwrap().unwrap_err().contains("its description"));
    }

    #[test]
    fn claims_are_patterns_of_names_and_metadata() {
        let description: Description = toml::from_str(TEXT).unwrap();
        let none = BTreeMap::new();
        assert!(description.claims(&["a.scale", "b"].into(), &none));
        assert!(!description.claims(&["a.scale", "a.shift"].into(), &none));
        assert!(!description.claims(&["b"].into(), &none));
        let metadata = [("kind".to_owned(), "scaling".to_owned())].into();
        assert!(description.claims(&["b"].into(), &metadata));
        assert!(!FileClaim::default().fits(&["b"].into(), &none));
    }
}
