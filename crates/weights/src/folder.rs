//! [`FolderContents`]: which files of a folder hold its tensors, by the names that diffusers and transformers give them.
//!
//! It opens the index alone, no tensor file.

use crate::json::{UniqueKeys, read_json};
use crate::{Result, WeightsError};
use serde::Deserialize;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

/// Each shard stays open while the checkpoint does; systems allow about a thousand open files.
const MOST_SHARDS: usize = 512;
const MOST_NAMES: usize = 100_000;
/// Ways to keep tensors, the best first.
const FORMS: [FileFormat; 3] = [
    FileFormat { stems: ["diffusion_pytorch_model", "model"], endings: &[".safetensors"] },
    FileFormat { stems: ["diffusion_pytorch_model", "pytorch_model"], endings: &[".bin", ".ckpt", ".pt", ".pth"] },
    FileFormat { stems: ["diffusion_pytorch_model", "model"], endings: &[".gguf"] },
];

/// A way to keep tensors.
#[derive(Debug)]
struct FileFormat {
    /// The libraries' names.
    stems: [&'static str; 2],
    /// Endings of its files, the libraries' own first.
    endings: &'static [&'static str],
}

/// The tensor files of one model.
#[derive(Debug)]
pub(crate) struct FolderContents {
    pub files: Vec<PathBuf>,
    pub index: Option<ShardIndex>,
    /// What else the folder holds, for a person to know.
    pub notes: Vec<String>,
}

/// Which shard holds which tensor, as the index says.
#[derive(Debug)]
pub(crate) struct ShardIndex {
    pub path: PathBuf,
    pub weight_map: BTreeMap<String, String>,
}

#[derive(Deserialize)]
struct RawShardIndex {
    weight_map: UniqueKeys<String>,
}

impl FolderContents {
    /// Finds the tensor files of `folder`.
    pub fn of_folder(folder: &Path) -> Result<Self> {
        let names = names_in(folder)?;
        for form in &FORMS {
            for stem in form.stems {
                if let Some(listing) = of_stem(folder, &names, stem, form.endings[0])? {
                    return Ok(listing.among(&names));
                }
            }
            if let Some(listing) = of_only(folder, &names, form.endings)? {
                return Ok(listing.among(&names));
            }
        }
        Err(bad(folder, nothing_found(&names)))
    }

    /// The same, with a note of what the libraries would call the same model in other files: a variant, say.
    fn among(mut self, names: &BTreeSet<String>) -> Self {
        let read: Vec<_> = self.files.iter().filter_map(|file| file.file_name()?.to_str()).collect();
        let others: Vec<_> = names.iter().filter(|name| is_usual(name) && !read.contains(&name.as_str())).collect();
        if let (Some(read), false) = (read.first(), others.is_empty()) {
            self.notes = vec![format!("{read:?} is read, and not {others:?} beside it")];
        }
        self
    }

    /// One file.
    pub fn of_file(path: PathBuf) -> Self {
        Self { files: vec![path], index: None, notes: Vec::new() }
    }

    /// The shards that an index names.
    pub fn of_index(path: PathBuf) -> Result<Self> {
        let RawShardIndex { weight_map: UniqueKeys(weight_map) } = read_json(&path)?;
        let shards: BTreeSet<&String> = weight_map.values().collect();
        if shards.len() > MOST_SHARDS {
            return Err(bad(&path, format!("{} shards, more than the {MOST_SHARDS} allowed", shards.len())));
        }
        let folder = path.parent().unwrap_or(Path::new(""));
        let files = shards.iter().map(|shard| shard_path(&path, folder, shard)).collect::<Result<Vec<_>>>()?;
        Ok(Self { files, index: Some(ShardIndex { path, weight_map }), notes: Vec::new() })
    }
}

/// Whether a file of this name holds tensors as one of the libraries saves them.
fn is_usual(name: &str) -> bool {
    let fits = |form: &FileFormat| {
        let stem = form.stems.iter().find_map(|stem| name.strip_prefix(stem));
        stem.is_some_and(|rest| rest.starts_with(['.', '-'])) && form.endings.iter().any(|end| name.ends_with(end))
    };
    FORMS.iter().any(fits)
}

fn of_stem(folder: &Path, names: &BTreeSet<String>, stem: &str, ending: &str) -> Result<Option<FolderContents>> {
    let (index, single) = (format!("{stem}{ending}.index.json"), format!("{stem}{ending}"));
    match (names.contains(&index), names.contains(&single)) {
        (true, true) => Err(bad(folder, format!("both {index:?} and {single:?} are here: remove the one not meant"))),
        (true, false) => FolderContents::of_index(folder.join(index)).map(Some),
        (false, true) => Ok(Some(FolderContents::of_file(folder.join(single)))),
        (false, false) => of_variant(folder, names, stem, ending),
    }
}

/// Files such as `model.fp16.safetensors`, or shards whose index is missing.
fn of_variant(folder: &Path, names: &BTreeSet<String>, stem: &str, ending: &str) -> Result<Option<FolderContents>> {
    let begins = |name: &str| name.strip_prefix(stem).is_some_and(|rest| rest.starts_with(['.', '-']));
    let with = |end: &str| names.iter().filter(|name| begins(name) && name.ends_with(end)).collect::<Vec<_>>();
    let infix = format!("{ending}.index.");
    let indices: Vec<_> = with(".json").into_iter().filter(|name| name.contains(&infix)).collect();
    let files = with(ending);
    let numbers: Vec<_> = files.iter().map(|name| shard_number(name, ending)).collect();
    match (&indices[..], &files[..]) {
        ([index], _) => FolderContents::of_index(folder.join(index)).map(Some),
        (_, []) => Ok(None),
        (_, [file]) if numbers[0].is_none_or(|shard| shard == (1, 1)) => {
            Ok(Some(FolderContents::of_file(folder.join(file))))
        }
        _ if all_shards(&numbers) => {
            let files = files.iter().map(|name| folder.join(name)).collect();
            Ok(Some(FolderContents { files, index: None, notes: Vec::new() }))
        }
        _ => Err(bad(folder, format!("{files:?} are not one whole model: shards or their index are missing"))),
    }
}

/// The one file with one of `endings`.
fn of_only(folder: &Path, names: &BTreeSet<String>, endings: &[&str]) -> Result<Option<FolderContents>> {
    let ends = |name: &&str| endings.iter().any(|ending| name.ends_with(ending));
    let tensors: Vec<&str> = names.iter().map(String::as_str).filter(ends).collect();
    match tensors[..] {
        [] => Ok(None),
        [only] => Ok(Some(FolderContents::of_file(folder.join(only)))),
        _ => Err(bad(folder, format!("several tensor files, none of the usual name: give one of {tensors:?}"))),
    }
}

/// (number, count) of a name that ends in `-00002-of-00003` and `ending`.
fn shard_number(name: &str, ending: &str) -> Option<(usize, usize)> {
    let (rest, count) = name.strip_suffix(ending)?.rsplit_once("-of-")?;
    let (_, number) = rest.rsplit_once('-')?;
    Some((number.parse().ok()?, count.parse().ok()?))
}

fn all_shards(numbers: &[Option<(usize, usize)>]) -> bool {
    let expected = (1..=numbers.len()).map(|number| Some((number, numbers.len())));
    numbers.len() <= MOST_SHARDS && numbers.iter().copied().eq(expected)
}

/// An index may come from anyone: its names must not lead out of the folder.
fn shard_path(index: &Path, folder: &Path, shard: &str) -> Result<PathBuf> {
    let ends = FORMS.iter().any(|form| shard.ends_with(form.endings[0]));
    let plain = ends && !shard.contains(['/', '\\', '\0', ':']) && !shard.starts_with('.');
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
    if names.contains("transformer") {
        return "no tensor file here: this is a pipeline folder, whose model is in \"transformer\"".to_owned();
    }
    "no .safetensors file in this folder, nor one of torch.save or a .gguf file".to_owned()
}

fn bad(path: &Path, reason: String) -> WeightsError {
    WeightsError::BadFile { path: path.to_owned(), reason }
}
