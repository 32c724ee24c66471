//! [`FolderContents`]: which files of a folder hold the tensors, by the names that diffusers and transformers use.
//!
//! Only the index is opened, no tensor file.

use crate::json::{UniqueKeys, read_json};
use crate::{Result, WeightsError, hub_cache};
use serde::Deserialize;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

/// Every shard stays open as long as the checkpoint; systems allow about a thousand open files.
const MOST_SHARDS: usize = 512;
/// Entries of a folder that are looked at.
const MOST_NAMES: usize = 100_000;
/// File formats in the order they are looked for: safetensors needs no parsing of pickles and has not lost precision,
/// so it comes first.
const FORMATS: [FileFormat; 3] = [
    FileFormat { stems: ["diffusion_pytorch_model", "model"], endings: &[".safetensors"] },
    FileFormat { stems: ["diffusion_pytorch_model", "pytorch_model"], endings: &[".bin", ".ckpt", ".pt", ".pth"] },
    FileFormat { stems: ["diffusion_pytorch_model", "model"], endings: &[".gguf"] },
];

/// A file format by its names.
#[derive(Debug)]
struct FileFormat {
    /// File names of diffusers and transformers, without their ending.
    stems: [&'static str; 2],
    /// Endings of the format, the one that the libraries use first.
    endings: &'static [&'static str],
}

/// The tensor files of one model.
#[derive(Debug)]
pub(crate) struct FolderContents {
    pub files: Vec<PathBuf>,
    pub index: Option<ShardIndex>,
    /// Other tensor files in the folder that are not read.
    pub notes: Vec<String>,
}

/// Which shard holds which tensor, according to the index.
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
        for format in &FORMATS {
            for stem in format.stems {
                if let Some(contents) = find_stem(folder, &names, stem, format.endings[0])? {
                    return Ok(contents.with_note_on_others(&names));
                }
            }
            if let Some(contents) = find_only_file(folder, &names, format.endings)? {
                return Ok(contents.with_note_on_others(&names));
            }
        }
        Err(bad(folder, nothing_found(folder, &names)))
    }

    /// Adds a note that names other files with standard names, such as another variant of the same model.
    fn with_note_on_others(mut self, names: &BTreeSet<String>) -> Self {
        let read: Vec<_> = self.files.iter().filter_map(|file| file.file_name()?.to_str()).collect();
        let is_other = |name: &&String| has_standard_name(name) && !read.contains(&name.as_str());
        let others: Vec<_> = names.iter().filter(is_other).collect();
        if let (Some(read), false) = (read.first(), others.is_empty()) {
            self.notes = vec![format!("reading {read:?}, not {others:?} in the same folder")];
        }
        self
    }

    /// The file that a user names. One shard of several is not a model.
    pub fn of_named_file(path: PathBuf) -> Result<Self> {
        match lone_shard(&path) {
            Some((number, count)) if count > 1 => Err(bad(&path, shard_remedy(&path, number, count))),
            _ => Ok(Self::of_file(path)),
        }
    }

    /// One file, whatever its name.
    fn of_file(path: PathBuf) -> Self {
        Self { files: vec![path], index: None, notes: Vec::new() }
    }

    /// All shards of a model without an index.
    fn of_shards(folder: &Path, names: &[impl AsRef<Path>]) -> Self {
        let files = names.iter().map(|name| folder.join(name)).collect();
        Self { files, index: None, notes: Vec::new() }
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

/// Whether diffusers or transformers would save tensors under this name.
fn has_standard_name(name: &str) -> bool {
    let is_of = |format: &FileFormat| {
        format.stems.iter().any(|stem| has_stem(name, stem)) && format.endings.iter().any(|end| name.ends_with(end))
    };
    FORMATS.iter().any(is_of)
}

/// Whether `name` is `stem` with a variant, shard number or ending after it.
fn has_stem(name: &str, stem: &str) -> bool {
    name.strip_prefix(stem).is_some_and(|rest| rest.starts_with(['.', '-']))
}

fn find_stem(folder: &Path, names: &BTreeSet<String>, stem: &str, ending: &str) -> Result<Option<FolderContents>> {
    let index = format!("{stem}{ending}.index.json");
    let single = format!("{stem}{ending}");
    match (names.contains(&index), names.contains(&single)) {
        (true, true) => Err(bad(
            folder,
            format!("{index:?} and {single:?} are both in this folder: remove the one you do not want"),
        )),
        (true, false) => FolderContents::of_index(folder.join(index)).map(Some),
        (false, true) => Ok(Some(FolderContents::of_file(folder.join(single)))),
        (false, false) => find_variant(folder, names, stem, ending),
    }
}

/// Finds files such as `model.fp16.safetensors`, or shards whose index is missing.
fn find_variant(folder: &Path, names: &BTreeSet<String>, stem: &str, ending: &str) -> Result<Option<FolderContents>> {
    let with_ending =
        |end: &str| names.iter().filter(|name| has_stem(name, stem) && name.ends_with(end)).collect::<Vec<_>>();
    let infix = format!("{ending}.index.");
    let indices: Vec<_> = with_ending(".json").into_iter().filter(|name| name.contains(&infix)).collect();
    let files = with_ending(ending);
    let numbers: Vec<_> = files.iter().map(|name| shard_number(name, ending)).collect();
    match (&indices[..], &files[..]) {
        ([index], _) => FolderContents::of_index(folder.join(index)).map(Some),
        (_, []) => Ok(None),
        (_, [file]) if numbers[0].is_none_or(|shard| shard == (1, 1)) => {
            Ok(Some(FolderContents::of_file(folder.join(file))))
        }
        _ if all_shards(&numbers) => Ok(Some(FolderContents::of_shards(folder, &files))),
        _ => Err(bad(folder, incomplete(&files))),
    }
}

/// The only file with one of `endings`.
fn find_only_file(folder: &Path, names: &BTreeSet<String>, endings: &[&str]) -> Result<Option<FolderContents>> {
    let has_ending = |name: &&str| endings.iter().any(|ending| name.ends_with(ending));
    let files: Vec<&str> = names.iter().map(String::as_str).filter(has_ending).collect();
    match files[..] {
        [] => Ok(None),
        [only] => FolderContents::of_named_file(folder.join(only)).map(Some),
        _ if are_one_model(&files) => Ok(Some(FolderContents::of_shards(folder, &files))),
        _ if files.iter().all(|file| lone_shard(Path::new(file)).is_some()) => Err(bad(folder, incomplete(&files))),
        _ => Err(bad(folder, format!("several tensor files, none with a standard name: pass one of {files:?}"))),
    }
}

fn incomplete(files: &[impl std::fmt::Debug]) -> String {
    format!("{files:?} are not one complete sharded model: shards or the index are missing")
}

/// Whether `names` are all the shards of one model, in order.
fn are_one_model(names: &[&str]) -> bool {
    let numbers: Vec<_> = names.iter().map(|name| lone_shard(Path::new(name))).collect();
    let stem = |name: &str| {
        name.rsplit_once("-of-").and_then(|(rest, _)| rest.rsplit_once('-')).map(|(stem, _)| stem.to_owned())
    };
    all_shards(&numbers) && names.iter().all(|name| stem(name) == stem(names[0]))
}

/// (number, count) of a name that ends with `-00002-of-00003` and `ending`.
fn shard_number(name: &str, ending: &str) -> Option<(usize, usize)> {
    let (rest, count) = name.strip_suffix(ending)?.rsplit_once("-of-")?;
    let (_, number) = rest.rsplit_once('-')?;
    Some((number.parse().ok()?, count.parse().ok()?))
}

/// (number, count) if the name of `path` is that of a shard.
fn lone_shard(path: &Path) -> Option<(usize, usize)> {
    let name = path.file_name()?.to_str()?;
    FORMATS.iter().flat_map(|format| format.endings).find_map(|ending| shard_number(name, ending))
}

/// What to do with one shard alone: the others may lie beside it.
fn shard_remedy(path: &Path, number: usize, count: usize) -> String {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let others = names_in(folder).unwrap_or_default().into_iter().filter_map(|name| lone_shard(Path::new(&name)));
    let present: BTreeSet<usize> = others.filter(|shard| shard.1 == count).map(|shard| shard.0).collect();
    let remedy = match present.len() == count {
        true => format!("pass the folder that holds them, {}", folder.display()),
        false => format!("put all {count} and their index in one folder, and pass that folder"),
    };
    format!("this is shard {number} of {count}, not a whole model: {remedy}")
}

fn all_shards(numbers: &[Option<(usize, usize)>]) -> bool {
    let expected = (1..=numbers.len()).map(|number| Some((number, numbers.len())));
    numbers.len() <= MOST_SHARDS && numbers.iter().copied().eq(expected)
}

/// The path of a shard. An index may come from anywhere: its names must not lead out of the folder.
fn shard_path(index: &Path, folder: &Path, shard: &str) -> Result<PathBuf> {
    let has_ending = FORMATS.iter().any(|format| shard.ends_with(format.endings[0]));
    let is_plain = has_ending && !shard.contains(['/', '\\', '\0', ':']) && !shard.starts_with('.');
    if is_plain { Ok(folder.join(shard)) } else { Err(bad(index, format!("shard {shard:?} is not a plain file name"))) }
}

fn names_in(folder: &Path) -> Result<BTreeSet<String>> {
    let io = |source| WeightsError::Io { path: folder.to_owned(), source };
    let mut names = BTreeSet::new();
    for entry in std::fs::read_dir(folder).map_err(io)?.take(MOST_NAMES) {
        names.extend(entry.map_err(io)?.file_name().into_string());
    }
    Ok(names)
}

fn nothing_found(folder: &Path, names: &BTreeSet<String>) -> String {
    if let Some(cached) = hub_cache::describe(folder) {
        return cached;
    }
    /// Files of a folder that is a model.
    const OF_MODELS: [&str; 3] = ["model_index.json", "clearform.toml", "diffusion_pytorch_model.safetensors"];
    let is_model = |name: &&String| OF_MODELS.iter().any(|file| folder.join(name).join(file).is_file());
    let models: Vec<&str> = names.iter().filter(is_model).map(String::as_str).collect();
    if names.contains("transformer") {
        return "no tensor file in this folder: it is a pipeline folder; the model is in \"transformer\"".to_owned();
    }
    let nothing = "no .safetensors, torch.save or .gguf file in this folder";
    match models.is_empty() {
        true => nothing.to_owned(),
        false => format!("{nothing}; the models in it are {models:?}: give one of them"),
    }
}

fn bad(path: &Path, reason: String) -> WeightsError {
    WeightsError::BadFile { path: path.to_owned(), reason }
}
