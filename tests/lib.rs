//! Reading the workspace's own sources, for the tests that hold them to their architecture and their vocabulary.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Folders that contain no sources.
const SKIPPED: [&str; 4] = ["target", ".git", "node_modules", "found"];

/// The root of the workspace.
pub fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap_or(Path::new("."))
}

/// Every file of the repository below `folder`, sorted: those that git knows or would add, or, without git, every file that
/// is not in a build folder.
///
/// # Panics
/// If a folder cannot be read.
pub fn files(folder: &Path) -> Vec<PathBuf> {
    let mut found = files_in_git(folder).unwrap_or_else(|| files_on_disk(folder));
    found.sort();
    found
}

fn files_in_git(folder: &Path) -> Option<Vec<PathBuf>> {
    let arguments = ["ls-files", "-z", "--cached", "--others", "--exclude-standard", "."];
    let output = Command::new("git").args(arguments).current_dir(folder).output().ok()?;
    let names = String::from_utf8(output.stdout).ok().filter(|names| output.status.success() && !names.is_empty())?;
    let paths = names.split_terminator('\0').map(|name| folder.join(name));
    // A file that was deleted but not committed yet is still listed.
    Some(paths.filter(|path| path.is_file() && !path.is_symlink()).collect())
}

fn files_on_disk(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
    let mut found = Vec::new();
    for path in entries.filter_map(|entry| Some(entry.ok()?.path())) {
        let is_skipped = path.file_name().is_some_and(|name| SKIPPED.iter().any(|skipped| name == *skipped));
        if path.is_symlink() || is_skipped {
            continue;
        }
        if path.is_dir() {
            found.extend(files_on_disk(&path));
        } else {
            found.push(path);
        }
    }
    found
}

/// Rust source with every comment, string and character replaced by spaces; line breaks are kept.
pub fn code_of(source: &str) -> String {
    let mut code = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(first) = rest.chars().next() {
        match skipped_length(rest) {
            // A word is taken whole: its last letter may look like the start of a raw string.
            0 => {
                let word = rest.find(|letter: char| !letter.is_alphanumeric() && letter != '_').unwrap_or(rest.len());
                let (kept, after) = rest.split_at(word.max(first.len_utf8()));
                code.push_str(kept);
                rest = after;
            }
            length => {
                let (skipped, after) = rest.split_at(length);
                code.extend(skipped.chars().map(|skipped| if skipped == '\n' { '\n' } else { ' ' }));
                rest = after;
            }
        }
    }
    code
}

/// Bytes of the comment, string or character that `text` begins with; 0 where it begins with code.
fn skipped_length(text: &str) -> usize {
    if text.starts_with("//") {
        return text.find('\n').unwrap_or(text.len());
    }
    if text.starts_with("/*") {
        return text.find("*/").map_or(text.len(), |end| end + 2);
    }
    if text.starts_with('"') {
        return quoted_length(text, '"');
    }
    if text.starts_with("r\"") || text.starts_with("r#") {
        return raw_string_length(text);
    }
    if text.starts_with('\'') {
        return character_length(text);
    }
    0
}

fn quoted_length(text: &str, quote: char) -> usize {
    let mut escaped = false;
    for (at, letter) in text.char_indices().skip(1) {
        match letter {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            _ if letter == quote => return at + 1,
            _ => {}
        }
    }
    text.len()
}

fn raw_string_length(text: &str) -> usize {
    let hashes = text[1..].bytes().take_while(|byte| *byte == b'#').count();
    if !text[1 + hashes..].starts_with('"') {
        return 0;
    }
    let end = format!("\"{}", "#".repeat(hashes));
    let begin = 2 + hashes;
    text[begin..].find(&end).map_or(text.len(), |at| begin + at + end.len())
}

/// A character literal, and not a lifetime.
fn character_length(text: &str) -> usize {
    let mut letters = text[1..].chars();
    match (letters.next(), letters.next()) {
        (Some('\\'), _) => quoted_length(text, '\''),
        (Some(letter), Some('\'')) => 2 + letter.len_utf8(),
        _ => 0,
    }
}

/// Whole identifiers of `code`, each with its line from 1 and the text before it on its line.
pub fn identifiers(code: &str) -> impl Iterator<Item = (usize, &str, &str)> {
    code.lines().enumerate().flat_map(|(at, line)| {
        let is_part = |letter: char| letter.is_alphanumeric() || letter == '_';
        let mut found = Vec::new();
        let mut begin = None;
        for (place, letter) in line.char_indices().chain([(line.len(), ' ')]) {
            match (begin, is_part(letter)) {
                (None, true) => begin = Some(place),
                (Some(from), false) => {
                    found.push((at + 1, &line[from..place], &line[..from]));
                    begin = None;
                }
                _ => {}
            }
        }
        found
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn comments_strings_and_characters_are_no_code() {
        let source = "let a = \"x // \\\" y\"; // z\nlet b: &'a str = r#\"q \" q\"#; /* c */ let d = '\"'; e";
        let code = code_of(source);
        assert_eq!(code.len(), source.len());
        let names: Vec<&str> = identifiers(&code).map(|(_, name, _)| name).collect();
        assert_eq!(names, ["let", "a", "let", "b", "a", "str", "let", "d", "e"]);
    }

    #[test]
    fn a_name_that_ends_in_r_begins_no_string() {
        assert_eq!(code_of("for\"a\" tar#b"), "for    tar#b");
    }
}
