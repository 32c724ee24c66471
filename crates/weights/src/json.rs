//! [`UniqueKeys`]: a JSON object that refuses a key given twice, and the reading of small JSON files.
//!
//! JSON readers keep the last of two equal keys without a word. In a header this hides a tensor, so it is an error
//! here. It knows nothing of tensors.

use crate::{Result, WeightsError, disguise};
use serde::de::{Deserialize, DeserializeOwned, Deserializer, Error, MapAccess, SeqAccess, Visitor};
use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::fmt;
use std::marker::PhantomData;
use std::path::Path;

/// No diffusion model comes near it, and this many names are judged within seconds.
const MOST_KEYS: usize = 50_000;
const LONGEST_KEY: usize = 4096;
const MOST_EXTENTS: usize = 32;
const LARGEST_FILE: u64 = 100_000_000;

/// Reads a JSON file of at most 100 MB.
pub(crate) fn read_json<T: DeserializeOwned>(path: &Path) -> Result<T> {
    let io = |source| WeightsError::Io { path: path.to_owned(), source };
    let about = std::fs::metadata(path).map_err(io)?;
    if !about.is_file() || about.len() > LARGEST_FILE {
        let reason = format!("expected a JSON file of at most {LARGEST_FILE} bytes, found {} bytes", about.len());
        return Err(WeightsError::BadFile { path: path.to_owned(), reason });
    }
    let bytes = std::fs::read(path).map_err(io)?;
    serde_json::from_slice(&bytes).map_err(|error| {
        let disguise = disguise::recognise(&bytes).filter(|_| !bytes.trim_ascii_start().starts_with(b"{"));
        let reason = disguise.unwrap_or_else(|| format!("not the JSON expected: {error}"));
        WeightsError::BadFile { path: path.to_owned(), reason }
    })
}

/// Refuses a key that no message could print.
pub(crate) fn check_length<E: Error>(key: &str) -> std::result::Result<(), E> {
    match key.len() {
        0..=LONGEST_KEY => Ok(()),
        length => Err(E::custom(format!("a key of {length} bytes, longer than the {LONGEST_KEY} allowed"))),
    }
}

/// A JSON object whose keys differ.
#[derive(Debug)]
pub(crate) struct UniqueKeys<T>(pub BTreeMap<String, T>);

impl<T> Default for UniqueKeys<T> {
    fn default() -> Self {
        Self(BTreeMap::new())
    }
}

impl<T> UniqueKeys<T> {
    /// Puts `value` in, unless the key is there, or too long, or there are too many.
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

/// The extents of a tensor; a list of millions of them is refused while it is read.
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
        f.write_str("a list of extents")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut sequence: A) -> std::result::Result<BoundedShape, A::Error> {
        let mut extents = Vec::new();
        while let Some(extent) = sequence.next_element()? {
            if extents.len() == MOST_EXTENTS {
                return Err(A::Error::custom(format!("more than {MOST_EXTENTS} extents")));
            }
            extents.push(extent);
        }
        Ok(BoundedShape(extents))
    }
}
