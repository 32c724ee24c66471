//! [`UniqueKeys`]: a JSON object that refuses repeated keys, and [`read_json`] for small JSON files.
//!
//! JSON parsers silently keep the last of two equal keys. In a safetensors header that would hide a tensor, so it is an
//! error here.

use crate::{Result, WeightsError, not_weights};
use serde::de::{Deserialize, DeserializeOwned, Deserializer, Error, MapAccess, SeqAccess, Visitor};
use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::fmt;
use std::marker::PhantomData;
use std::path::Path;

/// Far more tensors than any diffusion model has; this many are checked within seconds.
const MOST_KEYS: usize = 50_000;
/// Names of tensors have some dozens of bytes.
const LONGEST_KEY: usize = 4096;
/// Tensors of models have at most 7 dimensions.
const MOST_DIMENSIONS: usize = 32;
const LARGEST_FILE: u64 = 100_000_000;

/// Reads a JSON file of at most 100 MB.
///
/// # Errors
/// [`WeightsError::Io`] if the file cannot be read, [`WeightsError::BadFile`] if it is not the JSON expected; a file that
/// is something else, such as a git-lfs pointer, is named.
pub fn read_json<T: DeserializeOwned>(path: &Path) -> Result<T> {
    let io = |source| WeightsError::Io { path: path.to_owned(), source };
    let metadata = std::fs::metadata(path).map_err(io)?;
    if !metadata.is_file() || metadata.len() > LARGEST_FILE {
        let reason = format!("expected a JSON file of at most {LARGEST_FILE} bytes, found {} bytes", metadata.len());
        return Err(WeightsError::BadFile { path: path.to_owned(), reason });
    }
    let bytes = std::fs::read(path).map_err(io)?;
    serde_json::from_slice(&bytes).map_err(|error| {
        let disguise = not_weights::describe(&bytes).filter(|_| !bytes.trim_ascii_start().starts_with(b"{"));
        let reason = disguise.unwrap_or_else(|| format!("not the JSON expected: {error}"));
        WeightsError::BadFile { path: path.to_owned(), reason }
    })
}

/// Refuses keys longer than any real name.
pub(crate) fn check_length<E: Error>(key: &str) -> std::result::Result<(), E> {
    match key.len() {
        0..=LONGEST_KEY => Ok(()),
        length => Err(E::custom(format!("a key of {length} bytes, longer than the {LONGEST_KEY} allowed"))),
    }
}

/// A JSON object without repeated keys.
#[derive(Debug)]
pub(crate) struct UniqueKeys<T>(pub BTreeMap<String, T>);

impl<T> Default for UniqueKeys<T> {
    fn default() -> Self {
        Self(BTreeMap::new())
    }
}

impl<T> UniqueKeys<T> {
    /// Inserts `value`; an error if the key is repeated or too long, or if there are too many keys.
    pub fn put<E: Error>(&mut self, key: String, value: T) -> std::result::Result<(), E> {
        check_length(&key)?;
        if self.0.len() >= MOST_KEYS {
            return Err(E::custom(format!("more than {MOST_KEYS} keys")));
        }
        match self.0.entry(key) {
            Entry::Occupied(twice) => Err(E::custom(format!("key {:?} is given twice", twice.key()))),
            Entry::Vacant(free) => {
                free.insert(value);
                Ok(())
            }
        }
    }
}

impl<'de, T: Deserialize<'de>> Deserialize<'de> for UniqueKeys<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        deserializer.deserialize_map(UniqueKeysVisitor(PhantomData))
    }
}

struct UniqueKeysVisitor<T>(PhantomData<T>);

impl<'de, T: Deserialize<'de>> Visitor<'de> for UniqueKeysVisitor<T> {
    type Value = UniqueKeys<T>;

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<Self::Value, A::Error> {
        let mut unique = UniqueKeys::default();
        while let Some((key, value)) = map.next_entry()? {
            unique.put(key, value)?;
        }
        Ok(unique)
    }
}

/// A tensor's shape. A list of millions of dimensions is refused while it is parsed.
#[derive(Debug)]
pub(crate) struct BoundedShape(pub Vec<usize>);

impl<'de> Deserialize<'de> for BoundedShape {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        deserializer.deserialize_seq(BoundedShapeVisitor)
    }
}

struct BoundedShapeVisitor;

impl<'de> Visitor<'de> for BoundedShapeVisitor {
    type Value = BoundedShape;

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("a list of dimensions")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut sequence: A) -> std::result::Result<BoundedShape, A::Error> {
        let mut shape = Vec::new();
        while let Some(dimension) = sequence.next_element()? {
            if shape.len() == MOST_DIMENSIONS {
                return Err(A::Error::custom(format!("more than {MOST_DIMENSIONS} dimensions")));
            }
            shape.push(dimension);
        }
        Ok(BoundedShape(shape))
    }
}
