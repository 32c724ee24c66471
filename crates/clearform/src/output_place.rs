//! Whether outputs can be written, before anything is computed for them.

use crate::error::WithContext as _;
use crate::{ClearformError, Result};
use clearform_convert::ConvertError;
use clearform_portable_model::surrounding_model;
use clearform_runtime::RuntimeError;
use clearform_runtime::image_file::ImageFormat;
use clearform_weights::WeightsError;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

/// What other programs call their output.
const STDOUT: &str = "-";

/// What happens to an output that exists.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Existing {
    /// It is kept, and the command refused.
    #[default]
    Keep,
    /// It is replaced.
    Replace,
}

impl Existing {
    /// What `--overwrite` allows.
    pub fn replaced_if(overwrite: bool) -> Self {
        if overwrite { Self::Replace } else { Self::Keep }
    }
}

/// The name under which a file is written until it is whole. What is there when this is dropped is removed.
#[derive(Debug)]
pub(crate) struct TemporaryFile {
    path: PathBuf,
    /// The name that it gets.
    target: PathBuf,
}

impl TemporaryFile {
    /// One beside `path`, of the same extension.
    pub fn beside(path: &Path) -> Self {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let path_until_then = path.with_file_name(format!(".clearform-{}-{name}", std::process::id()));
        Self { path: path_until_then, target: path.to_owned() }
    }

    /// Lets `write` write to it. An error names the file by the name that it would have got.
    ///
    /// # Errors
    /// `write` fails.
    pub fn write<T, E>(&self, write: impl FnOnce(&Path) -> std::result::Result<T, E>) -> Result<T>
    where
        ClearformError: From<E>,
    {
        write(&self.path).map_err(|error| {
            let mut error = ClearformError::from(error);
            if let Some(path) = path_of(&mut error).filter(|path| **path == self.path) {
                path.clone_from(&self.target);
            }
            error
        })
    }

    /// Gives the file the name `to`, where nothing must be.
    ///
    /// # Errors
    /// [`ErrorKind::AlreadyExists`] if something is.
    pub fn rename_new(&self, to: &Path) -> std::io::Result<()> {
        match std::fs::hard_link(&self.path, to) {
            // File systems without hard links.
            Err(error) if error.kind() != ErrorKind::AlreadyExists && to.symlink_metadata().is_err() => {
                std::fs::rename(&self.path, to)
            }
            Err(_) => Err(ErrorKind::AlreadyExists.into()),
            Ok(()) => Ok(()),
        }
    }
}

impl Drop for TemporaryFile {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

/// A file that appears once it is whole, in place of another only if that is allowed.
#[derive(Debug)]
pub struct OutputFile {
    path: PathBuf,
    temporary: TemporaryFile,
    existing: Existing,
    _folder: OutputFolder,
}

impl OutputFile {
    /// Lets `write` write the file, and gives it its name.
    ///
    /// # Errors
    /// `write` fails, or a file of the name has appeared that may not be replaced.
    pub fn write<T, E>(self, write: impl FnOnce(&Path) -> std::result::Result<T, E>) -> Result<T>
    where
        ClearformError: From<E>,
    {
        let written = self.temporary.write(write)?;
        let published = match self.existing {
            Existing::Replace => std::fs::rename(&self.temporary.path, &self.path),
            Existing::Keep => self.temporary.rename_new(&self.path),
        };
        match published {
            Err(error) if error.kind() == ErrorKind::AlreadyExists => Err(already_exists(&self.path)),
            other => other.context(self.path.display()).map(|()| written),
        }
    }
}

/// The path in an error of writing.
fn path_of(error: &mut ClearformError) -> Option<&mut PathBuf> {
    let weights = match error {
        ClearformError::Weights(error) => error,
        ClearformError::Convert(error) => match error.as_mut() {
            ConvertError::Weights(error) => error,
            _ => return None,
        },
        ClearformError::Runtime(error) => match error.as_mut() {
            RuntimeError::Weights(error) => error,
            _ => return None,
        },
        _ => return None,
    };
    match weights {
        WeightsError::Io { path, .. } => Some(path),
        _ => None,
    }
}

fn already_exists(path: &Path) -> ClearformError {
    ClearformError::bad_option(format!(
        "{}: already exists; pass --overwrite to replace it or choose another name",
        path.display()
    ))
}

/// The folder of an output. When this is dropped, what was made of the folder is removed again if nothing was written to
/// it.
#[derive(Debug)]
#[must_use = "the folder is removed again when this is dropped"]
pub struct OutputFolder {
    /// The folders that were made, the innermost first.
    made: Vec<PathBuf>,
}

/// Makes the folder of the file `path`, and checks that the file can be written.
///
/// # Errors
/// `path` is a folder or `-`, or its folder cannot be made or written to.
pub fn prepare_file(path: &Path) -> Result<OutputFolder> {
    check_is_file(path)?;
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
    prepare_folder(folder.unwrap_or(Path::new("."))).context(path.display())
}

fn check_is_file(path: &Path) -> Result<()> {
    if path == Path::new(STDOUT) {
        return Err(ClearformError::bad_option("-o -: results are written to files, not to stdout; give a file name"));
    }
    // "o/" is a folder, also if it does not exist yet.
    let ends_as_folder = path.to_string_lossy().ends_with(std::path::is_separator);
    if path.is_dir() || ends_as_folder {
        return Err(ClearformError::bad_option(format!("{}: is a folder; expected a file name", path.display())));
    }
    Ok(())
}

/// As [`prepare_file`], for a safetensors file. One that exists is replaced only if `existing` allows it.
///
/// # Errors
/// As [`prepare_file`], or the name ends otherwise than in .safetensors, or the file exists.
pub fn prepare_tensor_file(path: &Path, existing: Existing) -> Result<OutputFile> {
    prepare_file_ending_in("safetensors", path, existing)
}

/// As [`prepare_tensor_file`], for a file whose name must end in `ending`.
///
/// # Errors
/// As [`prepare_tensor_file`].
pub(crate) fn prepare_file_ending_in(ending: &str, path: &Path, existing: Existing) -> Result<OutputFile> {
    check_is_file(path)?;
    if existing == Existing::Keep && std::fs::symlink_metadata(path).is_ok() {
        return Err(already_exists(path));
    }
    if path.extension().is_none_or(|extension| extension != ending) {
        return Err(ClearformError::bad_option(format!(
            "{}: tensors are written as {ending}; expected a name that ends in .{ending}",
            path.display()
        )));
    }
    let _folder = prepare_file(path)?;
    Ok(OutputFile { path: path.to_owned(), temporary: TemporaryFile::beside(path), existing, _folder })
}

/// Refuses to write to what is read: an output that is one of `inputs`, files or folders, or in one of them.
///
/// # Errors
/// It is.
pub fn check_is_no_input(output: &Path, inputs: &[&Path]) -> Result<()> {
    let Ok(real) = output.canonicalize() else { return Ok(()) };
    let read = inputs.iter().find(|input| input.canonicalize().is_ok_and(|input| real.starts_with(input)));
    match read {
        None => Ok(()),
        Some(input) => Err(ClearformError::bad_option(format!(
            "{}: belongs to {}, which is read; choose another name",
            output.display(),
            input.display()
        ))),
    }
}

/// As [`prepare_file`], for an image, whose format the name states.
///
/// # Errors
/// As [`prepare_file`], or the name ends otherwise than in .png, .jpg, .jpeg or .webp.
pub fn prepare_image(path: &Path) -> Result<OutputFolder> {
    if path != Path::new(STDOUT) {
        ImageFormat::of(path)?;
    }
    prepare_file(path)
}

/// As [`prepare_folder`], for a report. Files that have a name of one of its files are replaced only if `replace` allows
/// it.
///
/// # Errors
/// As [`prepare_folder`], or there is such a file.
pub fn prepare_report(folder: &Path, replace: bool) -> Result<OutputFolder> {
    let names = std::fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.file_name());
    let mut taken = names.filter(|name| name.to_str().is_some_and(is_of_report)).collect::<Vec<_>>();
    taken.sort_unstable();
    if let Some(first) = taken.first().filter(|_| !replace) {
        return Err(ClearformError::bad_option(format!(
            "{}: already exists; pass --overwrite to replace it or choose another folder",
            folder.join(first).display()
        )));
    }
    prepare_folder(folder)
}

/// Whether a report has a file or folder of this name.
fn is_of_report(name: &str) -> bool {
    const NAMES: [&str; 6] =
        ["report.html", "report.json", "sheet.png", "attention.safetensors", "fine-tune-replace", "fine-tune-shift"];
    NAMES.contains(&name) || (name.starts_with("transfer-") && name.ends_with(".png"))
}

/// Makes the folder `folder`, and checks that files can be written to it.
///
/// # Errors
/// It cannot be made or written to, or lies within a portable model.
pub fn prepare_folder(folder: &Path) -> Result<OutputFolder> {
    if let Some(model) = surrounding_model(&folder.join(STDOUT)) {
        return Err(ClearformError::bad_option(format!(
            "{}: is inside the portable model {}, whose files are recorded: choose a folder outside of it",
            folder.display(),
            model.display()
        )));
    }
    if folder.is_file() {
        let reason = format!("{}: is a file; expected a folder, or a name for a new one", folder.display());
        return Err(ClearformError::bad_option(reason));
    }
    let made = OutputFolder::make(folder)?;
    let probe = folder.join(format!(".clearform-{}", std::process::id()));
    let written = std::fs::write(&probe, []).and_then(|()| std::fs::remove_file(&probe));
    written.context(format_args!("{}: cannot be written to", folder.display()))?;
    Ok(made)
}

impl OutputFolder {
    fn make(folder: &Path) -> Result<Self> {
        let missing = folder.ancestors().take_while(|folder| !folder.as_os_str().is_empty() && !folder.exists());
        let made = Self { made: missing.map(Path::to_owned).collect() };
        std::fs::create_dir_all(folder).context(folder.display())?;
        Ok(made)
    }
}

impl Drop for OutputFolder {
    fn drop(&mut self) {
        // A folder with something in it is not removed.
        let _ = self.made.iter().try_for_each(std::fs::remove_dir);
    }
}
