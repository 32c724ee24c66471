//! [`GgufMetadata`]: what the metadata of a GGUF file say of its tensors, and the short texts among them, for a person.
//!
//! All other values are passed over: the lists of a text encoder's tokenizer are most of them.

use super::reader::GgufReader;
use crate::Result;
use crate::error::printed;
use std::collections::{BTreeMap, BTreeSet};

/// What a file without metadata has.
const ALIGNMENT: u64 = 32;
const LARGEST_ALIGNMENT: u64 = 65_536;
const ALIGNMENT_KEY: &str = "general.alignment";
/// Before the name of a tensor, by ComfyUI-GGUF: the extents it had, outermost first, before its rows were made to fit
/// the blocks. One for a tensor that is not there says nothing.
const SHAPE_KEY: &str = "comfy.gguf.orig_shape.";
const MOST_KEYS: u64 = 200_000;
/// Longer ones are whole tokenizers and templates.
const LONGEST_TEXT: u64 = 4096;
/// Extents that a list may have to be a shape.
const MOST_EXTENTS: u64 = 8;
const DEEPEST: u32 = 16;

const U32: u64 = 4;
const I32: u64 = 5;
const TEXT: u64 = 8;
const LIST: u64 = 9;
/// Bytes that a text and a list take when empty.
const LEAST_TEXT: u64 = 8;
const LEAST_LIST: u64 = 12;

/// What is kept of the metadata.
#[derive(Debug)]
pub(super) struct GgufMetadata {
    pub texts: BTreeMap<String, String>,
    /// Values begin at multiples of it.
    pub alignment: u64,
    /// Shapes by the names of their tensors.
    pub shapes: BTreeMap<String, Vec<u64>>,
}

/// One value, as far as it matters here.
enum GgufValue {
    Text(String),
    Number(u64),
    Extents(Vec<u64>),
    Other,
}

impl GgufMetadata {
    /// Reads `count` keys and their values.
    pub fn read(reader: &mut GgufReader, count: u64) -> Result<Self> {
        if count > MOST_KEYS {
            return Err(reader.bad(format!("it claims {count} metadata keys, more than the {MOST_KEYS} allowed")));
        }
        let mut metadata = Self { texts: BTreeMap::new(), alignment: ALIGNMENT, shapes: BTreeMap::new() };
        let mut known = BTreeSet::new();
        for number in 0..count {
            reader.enter(format!("metadata key {number} of {count}"));
            let key = reader.name()?;
            reader.enter(format!("metadata {}", printed(&key)));
            let kind = reader.number(4)?;
            let value = value(reader, kind)?;
            if !known.insert(key.clone()) {
                return Err(reader.bad("the key is given twice"));
            }
            metadata.keep(reader, key, value)?;
        }
        Ok(metadata)
    }

    fn keep(&mut self, reader: &GgufReader, key: String, value: GgufValue) -> Result<()> {
        match (key.strip_prefix(SHAPE_KEY), value) {
            (Some(tensor), GgufValue::Extents(extents)) => {
                self.shapes.insert(tensor.to_owned(), extents);
            }
            (Some(_), _) => {
                return Err(reader.bad(format!("expected a list of 1 to {MOST_EXTENTS} positive INT32, a shape")));
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
        GgufValue::Number(number) if number.is_power_of_two() && *number <= LARGEST_ALIGNMENT => Ok(*number),
        GgufValue::Number(number) => {
            Err(reader.bad(format!("expected a power of two up to {LARGEST_ALIGNMENT}, found {number}")))
        }
        _ => Err(reader.bad("expected a UINT32")),
    }
}

fn value(reader: &mut GgufReader, kind: u64) -> Result<GgufValue> {
    match kind {
        U32 => reader.number(4).map(GgufValue::Number),
        TEXT => text(reader),
        LIST => list(reader, 0),
        _ => {
            let width = width(reader, kind)?;
            reader.skip(width)?;
            Ok(GgufValue::Other)
        }
    }
}

fn text(reader: &mut GgufReader) -> Result<GgufValue> {
    let length = reader.number(8)?;
    if length > LONGEST_TEXT {
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
    let (kind, count) = (reader.number(4)?, reader.number(8)?);
    match kind {
        I32 if (1..=MOST_EXTENTS).contains(&count) => return extents(reader, count),
        TEXT => {
            reader.judge_count(count, LEAST_TEXT)?;
            for _ in 0..count {
                let length = reader.number(8)?;
                reader.skip(length)?;
            }
        }
        LIST => {
            reader.judge_count(count, LEAST_LIST)?;
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

fn extents(reader: &mut GgufReader, count: u64) -> Result<GgufValue> {
    let extents = (0..count).map(|_| reader.number(4)).collect::<Result<Vec<_>>>()?;
    let positive = extents.iter().all(|extent| (1..=i32::MAX as u64).contains(extent));
    Ok(if positive { GgufValue::Extents(extents) } else { GgufValue::Other })
}

/// Bytes of a number or truth value.
fn width(reader: &GgufReader, kind: u64) -> Result<u64> {
    match kind {
        0 | 1 | 7 => Ok(1),
        2 | 3 => Ok(2),
        U32 | I32 | 6 => Ok(4),
        10..=12 => Ok(8),
        _ => Err(reader.bad(format!("value type {kind}, which GGUF does not have: the file is damaged"))),
    }
}
