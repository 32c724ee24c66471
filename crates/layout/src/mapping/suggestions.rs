//! [`Suggestions`]: which of many tensor names one resembles, so that a misspelt tensor can be told. It knows no model.

use std::collections::BTreeMap;
use strsim::levenshtein;

/// Of the names of one block, no more are compared: a hostile file may hold a hundred thousand.
const MOST_COMPARED: usize = 2000;

/// Neighbours, by the number of their block.
#[derive(Debug)]
pub(crate) struct Suggestions<'a> {
    blocks: BTreeMap<Option<&'a str>, Vec<&'a str>>,
}

impl<'a> Suggestions<'a> {
    /// Of names that resemble another equally, the first is preferred.
    pub fn new(names: impl IntoIterator<Item = &'a str>) -> Self {
        let mut blocks: BTreeMap<_, Vec<_>> = BTreeMap::new();
        for name in names {
            blocks.entry(block(name)).or_default().push(name);
        }
        Self { blocks }
    }

    /// The name of the same block that is `name` with more or less before it, or else can be made from it by changing at
    /// most a quarter of its letters.
    pub fn nearest(&self, name: &str) -> Option<&'a str> {
        let names = self.blocks.get(&block(name))?.iter().take(MOST_COMPARED);
        let near = names.filter_map(|other| Some((distance(name, other)?, *other)));
        near.min_by_key(|(distance, _)| *distance).map(|(_, other)| other)
    }
}

fn distance(name: &str, other: &str) -> Option<usize> {
    let ends = |long: &str, short: &str| long.strip_suffix(short).is_some_and(|rest| rest.ends_with('.'));
    if ends(name, other) || ends(other, name) {
        return Some(0);
    }
    let allowed = name.len() / 4;
    let changes = if name.len().abs_diff(other.len()) > allowed { usize::MAX } else { levenshtein(name, other) };
    (1..=allowed).contains(&changes).then_some(changes)
}

/// The first part of a name that is a number.
fn block(name: &str) -> Option<&str> {
    name.split('.').find(|part| !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_digit()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_near_to_what_it_was_meant_to_be() {
        let known = [
            "img_in.weight",
            "double_blocks.1.img_attn.qkv.weight",
            "double_blocks.1.img_attn.proj.weight",
            "double_blocks.1.txt_attn.qkv.weight",
            "double_blocks.11.img_attn.qkv.weight",
            "transformer_blocks.1.attn.to_out.0.weight",
        ];
        let names = Suggestions::new(known);
        for (name, near) in [
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
            assert_eq!(names.nearest(name), near.map(|at: usize| known[at]), "{name}");
        }
    }
}
