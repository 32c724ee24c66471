//! Recognises, by its first bytes, a file that only bears the name of a tensor file. It reads nothing itself.

/// Beginnings of files that people have instead of the one they wanted, what each is, and the remedy.
const DISGUISES: &[(&[u8], &str)] = &[
    (b"version https://git-lfs", "a git-lfs pointer, not the file itself: run `git lfs pull`, or download the file"),
    (b"<", "an HTML or XML page, not tensors: the download failed or needs a login; download the file again"),
    (b"\x1f\x8b", "a gzip archive: unpack it"),
    (b"{", "JSON text, not tensors: if it is an index, give the folder that holds it and its shards"),
];

/// What a file that starts with `beginning` is, where it is one of the usual mistakes.
pub(crate) fn recognise(beginning: &[u8]) -> Option<String> {
    let text = beginning.trim_ascii_start();
    let is = |magic: &[u8]| beginning.starts_with(magic) || text.starts_with(magic);
    DISGUISES.iter().find(|(magic, _)| is(magic)).map(|(_, what)| format!("this is {what}"))
}
