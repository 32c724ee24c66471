//! [`Listing`]: which files of a folder hold its tensors, by the names that diffusers and transformers give them.
//!
//! It opens the index alone, no tensor file.

use crate::json::{Unique, read_json};
use crate::{Result, WeightsError};
use serde::Deserialize;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

/// Each shard stays open while the checkpoint does; systems allow about a thousand open files.
const MOST_SHARDS: usize = 512;
const MOST_NAMES: usize = 100_000;
const STEMS: [&str; 2] = ["diffusion_pytorch_model", "model"];
const SUFFIX: &str = ".safetensors";

/// The tensor files of one model.
#[derive(Debug)]
pub(crate) struct Listing {
    pub files: Vec<PathBuf>,
    pub index: Option<Index>,
}

/// Which shard holds which tensor, as the index says.
#[derive(Debug)]
pub(crate) struct Index {
    pub path: PathBuf,
    pub weight_map: BTreeMap<String, String>,
}

#[derive(Deserialize)]
struct RawIndex {
    weight_map: Unique<String>,
}

impl Listing {
    /// Finds the tensor files of `folder`.
    pub fn of_folder(folder: &Path) -> Result<Self> {
        let names = names_in(folder)?;
        for stem in STEMS {
            if let Some(listing) = of_stem(folder, &names, stem)? {
                return Ok(listing);
            }
        }
        let tensors: Vec<&str> = names.iter().map(String::as_str).filter(|name| name.ends_with(SUFFIX)).collect();
        match tensors[..] {
            [only] => Ok(Self::of_file(folder.join(only))),
            [] => Err(bad(folder, nothing_found(&names))),
            _ => Err(bad(folder, format!("several tensor files, none of the usual name: give one of {tensors:?}"))),
        }
    }

    /// One file.
    pub fn of_file(path: PathBuf) -> Self {
        Self { files: vec![path], index: None }
    }

    /// The shards that an index names.
    pub fn of_index(path: PathBuf) -> Result<Self> {
        let RawIndex { weight_map: Unique(weight_map) } = read_json(&path)?;
        let shards: BTreeSet<&String> = weight_map.values().collect();
        if shards.len() > MOST_SHARDS {
            return Err(bad(&path, format!("{} shards, more than the {MOST_SHARDS} allowed", shards.len())));
        }
        let folder = path.parent().unwrap_or(Path::new(""));
        let files = shards.iter().map(|shard| shard_path(&path, folder, shard)).collect::<Result<Vec<_>>>()?;
        Ok(Self { files, index: Some(Index { path, weight_map }) })
    }
}

fn of_stem(folder: &Path, names: &BTreeSet<String>, stem: &str) -> Result<Option<Listing>> {
    let (index, single) = (format!("{stem}{SUFFIX}.index.json"), format!("{stem}{SUFFIX}"));
    match (names.contains(&index), names.contains(&single)) {
        (true, true) => Err(bad(folder, format!("both {index:?} and {single:?} are here: remove the one not meant"))),
        (true, false) => Listing::of_index(folder.join(index)).map(Some),
        (false, true) => Ok(Some(Listing::of_file(folder.join(single)))),
        (false, false) => of_variant(folder, names, stem),
    }
}

/// Files such as `model.fp16.safetensors`, or shards whose index is missing.
fn of_variant(folder: &Path, names: &BTreeSet<String>, stem: &str) -> Result<Option<Listing>> {
    let begins = |name: &str| name.strip_prefix(stem).is_some_and(|rest| rest.starts_with(['.', '-']));
    let with = |end: &str| names.iter().filter(|name| begins(name) && name.ends_with(end)).collect::<Vec<_>>();
    let indices: Vec<_> = with(".json").into_iter().filter(|name| name.contains(".safetensors.index.")).collect();
    let files = with(SUFFIX);
    match (&indices[..], &files[..]) {
        ([index], _) => Listing::of_index(folder.join(index)).map(Some),
        (_, []) => Ok(None),
        (_, [file]) if shard_number(file).is_none_or(|shard| shard == (1, 1)) => {
            Ok(Some(Listing::of_file(folder.join(file))))
        }
        _ if all_shards(&files) => {
            Ok(Some(Listing { files: files.iter().map(|name| folder.join(name)).collect(), index: None }))
        }
        _ => Err(bad(folder, format!("{files:?} are not one whole model: shards or their index are missing"))),
    }
}

/// (number, count) of a name that ends in `-00002-of-00003.safetensors`.
fn shard_number(name: &str) -> Option<(usize, usize)> {
    let (rest, count) = name.strip_suffix(SUFFIX)?.rsplit_once("-of-")?;
    let (_, number) = rest.rsplit_once('-')?;
    Some((number.parse().ok()?, count.parse().ok()?))
}

fn all_shards(files: &[&String]) -> bool {
    let expected = (1..=files.len()).map(|number| Some((number, files.len())));
    files.len() <= MOST_SHARDS && files.iter().map(|name| shard_number(name)).eq(expected)
}

/// An index may come from anyone: its names must not lead out of the folder.
fn shard_path(index: &Path, folder: &Path, shard: &str) -> Result<PathBuf> {
    let plain = !shard.contains(['/', '\\', '\0', ':']) && shard.ends_with(SUFFIX) && !shard.starts_with('.');
    if plain { Ok(folder.join(shard)) } else { Err(bad(index, format!("shard {shard:?} is not a plain file name"))) }
}

fn names_in(folder: &Path) -> Result<BTreeSet<String>> {
    let io = |source| WeightsError::Io { path: folder.to_owned(), source };
    let mut names = BTreeSet::new();
    for entry in std::fs::read_dir(folder).map_err(io)?.take(MOST_NAMES) {
        names.extend(entry.map_err(io)?.file_name().into_string());
    }
    Ok(names)
}

fn nothing_found(names: &BTreeSet<String>) -> String {
    let other = |end: &str| names.iter().find(|name| name.ends_with(end));
    if names.contains("transformer") {
        return "no tensor file here: this is a pipeline folder, whose model is in \"transformer\"".to_owned();
    }
    match [".bin", ".pt", ".pth", ".ckpt", ".gguf"].into_iter().find_map(other) {
        Some(name) => format!("no .safetensors file; {name:?} is of a format that is not supported: convert it first"),
        None => "no .safetensors file in this folder".to_owned(),
    }
}

fn bad(path: &Path, reason: String) -> WeightsError {
    WeightsError::BadFile { path: path.to_owned(), reason }
}
