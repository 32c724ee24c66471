//! [`Description`]: what a plugin states about itself. A library's is read from its file without loading it.

use clearform_layout::glob;
use clearform_plugin_abi::{DESCRIPTION_BEGIN, DESCRIPTION_END};
use memchr::memmem::find;
use serde::Deserialize;
use std::collections::{BTreeMap, BTreeSet};

/// Descriptions are short: an end marker further away belongs to something else.
const MAX_LENGTH: usize = 1 << 16;

/// A plugin's description: TOML, embedded in its library or in the program.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Description {
    /// The ID in `--adapter FILE,plugin=ID`.
    pub id: String,
    /// Version of the plugin.
    pub version: String,
    /// Interface with its revision, such as `clearform.adapter/1`.
    pub interface: String,
    /// Major version of the plugin interface.
    pub abi: u32,
    /// Purpose of the plugin, in one line.
    pub summary: String,
    /// The plugin opens a file that matches any of these.
    pub claims: Vec<FileClaim>,
    /// Files that are often taken for its own, with the reasons why it does not open them.
    #[serde(default)]
    pub refused: Vec<RefusedFile>,
    /// Small files that it must open, for `clearform plugins check`.
    #[serde(default, rename = "example")]
    pub examples: Vec<Example>,
}

/// Patterns for tensor names and metadata; `*` matches any text. All conditions must hold.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct FileClaim {
    /// At least one of these names exists.
    pub any: Vec<String>,
    /// All of these names exist.
    pub all: Vec<String>,
    /// None of these names exists.
    pub none: Vec<String>,
    /// These keys have values that match.
    pub metadata: BTreeMap<String, String>,
}

/// A kind of file that a plugin knows and does not open.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RefusedFile {
    /// Patterns of tensor names; the file has one of them.
    pub any: Vec<String>,
    /// What the file is, and what to do.
    pub reason: String,
}

/// A small file, and what the plugin must make of it.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Example {
    /// What the example shows.
    pub name: String,
    /// Shape of each tensor.
    pub tensors: BTreeMap<String, Vec<usize>>,
    /// Metadata of the file.
    #[serde(default)]
    pub metadata: BTreeMap<String, String>,
    /// Expected edits of an adapter, in order: `component.parameter`.
    #[serde(default)]
    pub edits: Vec<String>,
    /// The model that a ControlNet runs beside.
    pub base: Option<ExampleBase>,
    /// One evaluation of a ControlNet.
    pub step: Option<ExampleStep>,
}

/// One evaluation of a ControlNet: the sizes of its inputs, and the expected residuals.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ExampleStep {
    /// Rows and columns of the image tokens.
    pub grid: [usize; 2],
    /// Channels of a latent token.
    pub channels: usize,
    /// Shape of the latents, for models that do not take them packed into tokens.
    pub latents: Option<Vec<usize>>,
    /// Shape of the latents as the model embeds them, for a ControlNet that takes them so.
    pub embedded: Option<Vec<usize>>,
    /// Tokens and channels of the text.
    pub text: [usize; 2],
    /// Channels of the pooled text.
    pub pooled: usize,
    /// Shape of the control.
    pub control: Vec<usize>,
    /// Expected blocks of each residual, in order.
    pub residuals: Vec<Vec<usize>>,
}

/// The model that an example's ControlNet runs beside.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ExampleBase {
    /// Family, such as "flux".
    pub family: String,
    /// The model's config.json.
    pub config: toml::Table,
}

impl Description {
    /// The description in a text without markers, as that of a plugin that is linked into the program.
    ///
    /// # Errors
    /// The text is not TOML, or not a description.
    pub fn parse(text: &str) -> Result<Self, String> {
        toml::from_str(text).map_err(|error| format!("its description: {error}"))
    }

    /// The description in the bytes of a library's file; `None` if there is none.
    ///
    /// # Errors
    /// The inner result: the description is not valid.
    pub fn find(library: &[u8]) -> Option<Result<Self, String>> {
        let begin = find(library, DESCRIPTION_BEGIN.as_bytes())? + DESCRIPTION_BEGIN.len();
        let rest = &library[begin..library.len().min(begin + MAX_LENGTH)];
        let end = find(rest, DESCRIPTION_END.as_bytes())?;
        let text = std::str::from_utf8(&rest[..end]).map_err(|_| "its description is not UTF-8".to_owned());
        Some(text.and_then(Self::parse))
    }

    /// Why the plugin does not open a file with the tensor `name`, if it knows the kind of file.
    pub fn refusal(&self, name: &str) -> Option<&str> {
        let is_of = |kind: &&RefusedFile| kind.any.iter().any(|pattern| glob(pattern, name));
        self.refused.iter().find(is_of).map(|kind| kind.reason.as_str())
    }

    /// Whether the plugin claims a file with these tensor `names` and this `metadata`.
    pub fn claims(&self, names: &BTreeSet<&str>, metadata: &BTreeMap<String, String>) -> bool {
        self.claims.iter().any(|claim| claim.matches(names, metadata))
    }
}

impl FileClaim {
    fn matches(&self, names: &BTreeSet<&str>, metadata: &BTreeMap<String, String>) -> bool {
        let exists = |pattern: &String| names.iter().any(|name| glob(pattern, name));
        let has_value =
            |(key, pattern): (&String, &String)| metadata.get(key).is_some_and(|value| glob(pattern, value));
        // Without this, an empty claim or one of `none` alone would match almost every file.
        let is_specific = !(self.any.is_empty() && self.all.is_empty() && self.metadata.is_empty());
        is_specific
            && (self.any.is_empty() || self.any.iter().any(exists))
            && self.all.iter().all(exists)
            && !self.none.iter().any(exists)
            && self.metadata.iter().all(has_value)
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
        [[refused]]
        any = ["*.factor", "factors"]
        reason = "this is a table of factors: convert it"
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
    fn a_kind_of_file_that_is_not_opened_is_named() {
        let description = Description::parse(TEXT).unwrap();
        let reason = Some("this is a table of factors: convert it");
        assert_eq!((description.refusal("a.factor"), description.refusal("factors")), (reason, reason));
        assert_eq!(description.refusal("a.scale"), None);
    }

    #[test]
    fn claims_are_patterns_of_names_and_metadata() {
        let description = Description::parse(TEXT).unwrap();
        let none = BTreeMap::new();
        assert!(description.claims(&["a.scale", "b"].into(), &none));
        assert!(!description.claims(&["a.scale", "a.shift"].into(), &none));
        assert!(!description.claims(&["b"].into(), &none));
        let metadata = [("kind".to_owned(), "scaling".to_owned())].into();
        assert!(description.claims(&["b"].into(), &metadata));
        assert!(!FileClaim::default().matches(&["b"].into(), &none));
    }
}
