//! [`image_names`]: the files that `generate` writes.

use anyhow::bail;
use std::path::{Path, PathBuf};

/// Numbers are tried up to this one.
const MOST: usize = 100_000;

/// Digits of numbers where the pattern states none.
const DIGITS: usize = 3;

/// One file name per image: `out-%03d.png` sets where the number goes; without it, several images get `-000` and so on
/// before the extension. Names that are taken are passed over: the numbers begin with the first from which on as many
/// as needed are free, and a single `out.png` becomes `out-001.png`.
///
/// # Errors
/// A folder, a device, a pattern other than `%d` or `%0Nd`, or no free numbers.
pub fn image_names(pattern: &str, batch: usize, is_taken: impl Fn(&Path) -> bool) -> anyhow::Result<Vec<PathBuf>> {
    if pattern.ends_with(std::path::is_separator) || Path::new(pattern).is_dir() {
        let example = Path::new(pattern).join("out.png");
        bail!("-o {pattern}: is a folder; expected a file name, such as {}", example.display());
    }
    if Path::new(pattern).metadata().is_ok_and(|metadata| !metadata.is_file()) {
        bail!("-o {pattern}: is a device; expected a file name, such as out.png");
    }
    let (name, first) = match NumberedName::parse(pattern)? {
        Some(name) => (name, 0),
        None if batch == 1 && !is_taken(Path::new(pattern)) => return Ok(vec![PathBuf::from(pattern)]),
        None => (NumberedName::before_extension(pattern), usize::from(batch == 1)),
    };
    let names = |start: usize| (start..start + batch).map(|number| name.at(number)).collect::<Vec<_>>();
    let free = (first..MOST).map(names).find(|names| !names.iter().any(|name| is_taken(name)));
    free.ok_or_else(|| anyhow::anyhow!("-o {pattern:?}: no free numbers below {MOST}; choose another name"))
}

/// Digits of a number, at most: those of the largest.
const MOST_DIGITS: usize = 20;

/// A file name with a number in it.
struct NumberedName<'a> {
    before: &'a str,
    separator: &'a str,
    digits: usize,
    after: &'a str,
}

impl<'a> NumberedName<'a> {
    /// The name with the place of its number; `None` if it has none.
    fn parse(pattern: &'a str) -> anyhow::Result<Option<Self>> {
        if pattern.matches('%').count() > 1 {
            bail!("-o {pattern:?}: expected one number pattern, found several");
        }
        let Some((before, rest)) = pattern.split_once("%0").or_else(|| pattern.split_once('%')) else {
            return Ok(None);
        };
        match rest.split_once('d') {
            Some((digits, after))
                if digits.is_empty() || digits.parse().is_ok_and(|digits: usize| digits <= MOST_DIGITS) =>
            {
                Ok(Some(Self { before, separator: "", digits: digits.parse().unwrap_or(1), after }))
            }
            _ => bail!("-o {pattern:?}: expected a number pattern such as %03d"),
        }
    }

    fn before_extension(name: &'a str) -> Self {
        let stem = name.rsplit_once('.').map_or(name, |(stem, _)| stem);
        Self { before: stem, separator: "-", digits: DIGITS, after: &name[stem.len()..] }
    }

    fn at(&self, number: usize) -> PathBuf {
        let Self { before, separator, digits, after } = self;
        PathBuf::from(format!("{before}{separator}{number:0digits$}{after}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(pattern: &str, batch: usize, taken: &[&str]) -> Vec<String> {
        let names = image_names(pattern, batch, |path| taken.iter().any(|taken| path == Path::new(taken))).unwrap();
        names.iter().map(|name| name.display().to_string()).collect()
    }

    #[test]
    fn several_images_are_numbered() {
        assert_eq!(names("out.png", 1, &[]), ["out.png"]);
        assert_eq!(names("out.png", 2, &[]), ["out-000.png", "out-001.png"]);
        assert_eq!(names("a/%03d.png", 2, &[]), ["a/000.png", "a/001.png"]);
        assert_eq!(names("x-%d.png", 1, &[]), ["x-0.png"]);
        assert!(image_names("x-%s.png", 1, |_| false).is_err());
        let several = image_names("x-%d-%03d.png", 1, |_| false).unwrap_err().to_string();
        assert!(several.contains("one number pattern"), "{several}");
        for (folder, batch) in [("o/", 1), ("o/", 2), ("/", 1), (".", 2)] {
            let error = image_names(folder, batch, |_| false).unwrap_err().to_string();
            assert!(error.contains("is a folder; expected a file name, such as"), "{error}");
        }
    }

    #[test]
    fn names_that_are_taken_are_passed_over() {
        assert_eq!(names("out.png", 1, &["out.png"]), ["out-001.png"]);
        assert_eq!(names("out.jpg", 1, &["out.jpg", "out-001.jpg"]), ["out-002.jpg"]);
        assert_eq!(names("out.png", 2, &["out-001.png"]), ["out-002.png", "out-003.png"]);
        assert_eq!(names("%02d.png", 1, &["00.png"]), ["01.png"]);
        assert!(image_names("out.png", 1, |_| true).is_err());
    }
}
