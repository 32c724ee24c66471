//! [`Suggestions`]: the most similar of many tensor names, so that an error can name what a renamed tensor was.

use std::collections::BTreeMap;
use strsim::levenshtein;

/// Names of one block that are compared; a hostile file may have a hundred thousand.
const MOST_COMPARED: usize = 2000;
/// Of a similar name at most one letter in so many differs. A renamed module ("qkv" as "to_qkv", "proj" as
/// "projection") changes fewer; different modules of a block differ in more.
const LETTERS_PER_CHANGE: usize = 4;

/// Candidates by the number of their block. Names of other blocks differ in a digit only and are never meant.
#[derive(Debug)]
pub(crate) struct Suggestions<'a> {
    blocks: BTreeMap<Option<&'a str>, Vec<&'a str>>,
}

impl<'a> Suggestions<'a> {
    /// Of equally similar names, the first is suggested.
    pub fn new(names: impl IntoIterator<Item = &'a str>) -> Self {
        let mut blocks: BTreeMap<_, Vec<_>> = BTreeMap::new();
        for name in names {
            blocks.entry(block(name)).or_default().push(name);
        }
        Self { blocks }
    }

    /// The most similar name of the same block: one that differs in its prefix only, or else by the smallest edit
    /// distance, if that is at most a quarter of the name's length.
    pub fn nearest(&self, name: &str) -> Option<&'a str> {
        let names = self.blocks.get(&block(name))?.iter().take(MOST_COMPARED);
        let similar = names.filter_map(|other| Some((distance(name, other)?, *other)));
        similar.min_by_key(|(distance, _)| *distance).map(|(_, other)| other)
    }
}

/// The distance of two similar names; `None` if they are not similar, or equal.
fn distance(name: &str, other: &str) -> Option<usize> {
    let has_suffix = |long: &str, short: &str| long.strip_suffix(short).is_some_and(|rest| rest.ends_with('.'));
    if has_suffix(name, other) || has_suffix(other, name) {
        return Some(0);
    }
    let allowed = name.len() / LETTERS_PER_CHANGE;
    // Names of very different lengths need no comparison.
    let changes = if name.len().abs_diff(other.len()) > allowed { usize::MAX } else { levenshtein(name, other) };
    (1..=allowed).contains(&changes).then_some(changes)
}

/// The number of the block that `name` is in: its first segment that is a number.
fn block(name: &str) -> Option<&str> {
    name.split('.').find(|segment| !segment.is_empty() && segment.bytes().all(|byte| byte.is_ascii_digit()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_name_that_was_meant_is_suggested() {
        let known = [
            "img_in.weight",
            "double_blocks.1.img_attn.qkv.weight",
            "double_blocks.1.img_attn.proj.weight",
            "double_blocks.1.txt_attn.qkv.weight",
            "double_blocks.11.img_attn.qkv.weight",
            "transformer_blocks.1.attn.to_out.0.weight",
        ];
        let names = Suggestions::new(known);
        for (name, expected) in [
            ("double_blocks.1.img_attn.qvk.weight", Some(1)),
            ("double_blocks.1.img_attn.projection.weight", Some(2)),
            ("double_blocks.11.img_attn.qvk.weight", Some(4)),
            ("double_blocks.1.txt_attn.qkv_proj.weight", Some(3)),
            ("unet.double_blocks.1.img_attn.qkv.weight", Some(1)),
            ("blocks.1.img_attn.qkv.weight", Some(1)),
            ("transformer_blocks.1.attn.to_out.weight", Some(5)),
            ("model.diffusion_model.img_in.weight", Some(0)),
            ("image_in.weight", Some(0)),
            ("double_blocks.2.img_attn.qkv.weight", None),
            ("stray.weight", None),
            ("img_in.weight", None),
            ("", None),
        ] {
            assert_eq!(names.nearest(name), expected.map(|index: usize| known[index]), "{name}");
        }
    }
}
