//! [`GgufMetadata`]: the metadata of a GGUF file that concern its tensors, and its short strings.
//!
//! All other values are skipped; most of them are the lists of a text encoder's tokenizer.

use super::reader::GgufReader;
use crate::Result;
use crate::error::printed;
use std::collections::{BTreeMap, BTreeSet};

/// The alignment of files that do not give one.
const DEFAULT_ALIGNMENT: u64 = 32;
const LARGEST_ALIGNMENT: u64 = 65_536;
const ALIGNMENT_KEY: &str = "general.alignment";
/// ComfyUI-GGUF writes this before the name of a tensor that it reshaped so that rows fit the blocks: the original
/// shape, outermost dimension first. A key for a missing tensor is ignored.
pub(super) const SHAPE_KEY: &str = "comfy.gguf.orig_shape.";
/// Real files have some dozens.
const MOST_KEYS: u64 = 200_000;
/// Longer strings are whole tokenizers and chat templates.
const LONGEST_TEXT: u64 = 4096;
/// What clearform writes itself: a model's config, and a plan that may name every layer.
const OWN_KEYS: &str = "clearform.";
const LONGEST_OWN_TEXT: u64 = 1 << 20;
/// A longer list is not a shape.
const MOST_DIMENSIONS: u64 = 8;
/// Nesting of lists, which are read recursively.
const DEEPEST: u32 = 16;

// Numbers of value types, as the specification gives them.
pub(super) const U32: u64 = 4;
pub(super) const I32: u64 = 5;
pub(super) const TEXT: u64 = 8;
pub(super) const LIST: u64 = 9;
/// Bytes of an empty string (its length) and of an empty list (its type and length).
const LEAST_TEXT: u64 = 8;
const LEAST_LIST: u64 = 12;

/// The metadata that are kept.
#[derive(Debug)]
pub(super) struct GgufMetadata {
    /// Short strings by key.
    pub texts: BTreeMap<String, String>,
    /// Tensors begin at multiples of this.
    pub alignment: u64,
    /// Original shapes by tensor name.
    pub shapes: BTreeMap<String, Vec<u64>>,
}

/// A value of the metadata.
enum GgufValue {
    Text(String),
    U32(u64),
    Shape(Vec<u64>),
    /// Any other value, which is skipped.
    Other,
}

impl GgufMetadata {
    /// Reads `count` keys and their values.
    pub fn read(reader: &mut GgufReader, count: u64) -> Result<Self> {
        if count > MOST_KEYS {
            return Err(reader.bad(format!("it claims {count} metadata keys, more than the {MOST_KEYS} allowed")));
        }
        let mut metadata = Self { texts: BTreeMap::new(), alignment: DEFAULT_ALIGNMENT, shapes: BTreeMap::new() };
        let mut known = BTreeSet::new();
        for number in 0..count {
            reader.enter(format!("metadata key {number} of {count}"));
            let key = reader.name()?;
            reader.enter(format!("metadata {}", printed(&key)));
            let kind = reader.number(4)?;
            let longest = if key.starts_with(OWN_KEYS) { LONGEST_OWN_TEXT } else { LONGEST_TEXT };
            let value = value(reader, kind, longest)?;
            if !known.insert(key.clone()) {
                return Err(reader.bad("the key is given twice"));
            }
            metadata.keep(reader, key, value)?;
        }
        Ok(metadata)
    }

    fn keep(&mut self, reader: &GgufReader, key: String, value: GgufValue) -> Result<()> {
        match (key.strip_prefix(SHAPE_KEY), value) {
            (Some(tensor), GgufValue::Shape(shape)) => {
                self.shapes.insert(tensor.to_owned(), shape);
            }
            (Some(_), _) => {
                return Err(reader.bad(format!("expected a shape, a list of 1 to {MOST_DIMENSIONS} positive INT32")));
            }
            (None, value) if key == ALIGNMENT_KEY => self.alignment = alignment(reader, &value)?,
            (None, GgufValue::Text(text)) => {
                self.texts.insert(key, text);
            }
            (None, _) => {}
        }
        Ok(())
    }
}

fn alignment(reader: &GgufReader, value: &GgufValue) -> Result<u64> {
    match value {
        GgufValue::U32(number) if number.is_power_of_two() && *number <= LARGEST_ALIGNMENT => Ok(*number),
        GgufValue::U32(number) => {
            Err(reader.bad(format!("expected a power of two up to {LARGEST_ALIGNMENT}, found {number}")))
        }
        _ => Err(reader.bad("expected a UINT32")),
    }
}

fn value(reader: &mut GgufReader, kind: u64, longest: u64) -> Result<GgufValue> {
    match kind {
        U32 => reader.number(4).map(GgufValue::U32),
        TEXT => text(reader, longest),
        LIST => list(reader, 0),
        _ => {
            let width = width(reader, kind)?;
            reader.skip(width)?;
            Ok(GgufValue::Other)
        }
    }
}

fn text(reader: &mut GgufReader, longest: u64) -> Result<GgufValue> {
    let length = reader.number(8)?;
    if length > longest {
        reader.skip(length)?;
        return Ok(GgufValue::Other);
    }
    let bytes = reader.take(length)?;
    Ok(GgufValue::Text(String::from_utf8_lossy(bytes).into_owned()))
}

fn list(reader: &mut GgufReader, depth: u32) -> Result<GgufValue> {
    if depth == DEEPEST {
        return Err(reader.bad(format!("lists nested more than {DEEPEST} deep")));
    }
    let kind = reader.number(4)?;
    let count = reader.number(8)?;
    match kind {
        I32 if (1..=MOST_DIMENSIONS).contains(&count) => return shape(reader, count),
        TEXT => {
            reader.check_count(count, LEAST_TEXT)?;
            for _ in 0..count {
                let length = reader.number(8)?;
                reader.skip(length)?;
            }
        }
        LIST => {
            reader.check_count(count, LEAST_LIST)?;
            for _ in 0..count {
                list(reader, depth + 1)?;
            }
        }
        _ => {
            let width = width(reader, kind)?;
            reader.skip_items(count, width)?;
        }
    }
    Ok(GgufValue::Other)
}

fn shape(reader: &mut GgufReader, count: u64) -> Result<GgufValue> {
    let shape = (0..count).map(|_| reader.number(4)).collect::<Result<Vec<_>>>()?;
    let positive = shape.iter().all(|dimension| (1..=i32::MAX as u64).contains(dimension));
    Ok(if positive { GgufValue::Shape(shape) } else { GgufValue::Other })
}

/// Bytes of a number or boolean.
fn width(reader: &GgufReader, kind: u64) -> Result<u64> {
    match kind {
        0 | 1 | 7 => Ok(1),
        2 | 3 => Ok(2),
        U32 | I32 | 6 => Ok(4),
        10..=12 => Ok(8),
        _ => Err(reader.bad(format!("unknown value type {kind}: the file is damaged"))),
    }
}
