//! [`plugin_folder`]: the shared libraries of the included plugins.

use std::env::consts::{DLL_PREFIX, DLL_SUFFIX};
use std::io::ErrorKind;
use std::os::unix::fs::symlink;
use std::path::PathBuf;

/// The packages of the libraries, in Rust's spelling.
const LIBRARIES: [&str; 3] = ["clearform_controlnet_library", "clearform_example", "clearform_lora_library"];

/// A folder with links to the plugins' libraries, which cargo builds next to a test if its crate depends on them.
/// Libraries of earlier builds, which cargo leaves there, are not in it.
///
/// # Panics
/// If a library is missing, or cannot be linked to.
pub fn plugin_folder() -> PathBuf {
    let test = std::env::current_exe().unwrap_or_else(|error| panic!("the test's path: {error}"));
    let folder = test.with_file_name("plugins");
    std::fs::create_dir_all(&folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
    for name in LIBRARIES.map(|library| format!("{DLL_PREFIX}{library}{DLL_SUFFIX}")) {
        let library = test.with_file_name(&name);
        assert!(library.is_file(), "{} is missing: the test's crate must depend on it", library.display());
        match symlink(&library, folder.join(&name)) {
            Err(error) if error.kind() != ErrorKind::AlreadyExists => panic!("{}: {error}", library.display()),
            _ => {}
        }
    }
    folder
}
