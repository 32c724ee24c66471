//! [`describe`]: what a file really is that has the name of a tensor file, by its first bytes.

/// How a git-lfs pointer begins.
const LFS: &[u8] = b"version https://git-lfs";
const LFS_POINTER: &str = "a git-lfs pointer, not the file itself: run `git lfs pull`, or download the file";

const IMAGE: &str = "an image: `generate --from-metadata` takes its settings, and --control-image its pixels";

/// How files begin that users often have instead of the one they wanted, what each is, and the remedy.
const DISGUISES: &[(&[u8], &str)] = &[
    (LFS, LFS_POINTER),
    (b"<", "an HTML or XML page, not tensors: the download failed or needs a login; download the file again"),
    (b"\x1f\x8b", "a gzip archive: unpack it"),
    (b"\x89PNG", IMAGE),
    (b"\xff\xd8\xff", IMAGE),
    (b"RIFF", IMAGE),
    (b"{", "JSON text, not tensors: if it is an index, pass the folder that holds it and its shards"),
];

/// What is wrong with a small file, such as a config, that is only a git-lfs pointer to it; `None` for any other file.
pub fn lfs_pointer(content: &[u8]) -> Option<String> {
    content.starts_with(LFS).then(|| format!("this is {LFS_POINTER}"))
}

/// What a file is that starts with `beginning`, if it is one of the usual mistakes.
pub(crate) fn describe(beginning: &[u8]) -> Option<String> {
    let text = beginning.trim_ascii_start();
    let starts_with = |magic: &[u8]| beginning.starts_with(magic) || text.starts_with(magic);
    DISGUISES.iter().find(|(magic, _)| starts_with(magic)).map(|(_, what)| format!("this is {what}"))
}
