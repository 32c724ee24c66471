//! [`image_names`]: the files that `generate` writes.

use anyhow::bail;
use std::path::PathBuf;

/// One file name per image: `out-%03d.png` sets where the number goes; without it, several images get `-000` and so on
/// before the extension.
pub fn image_names(pattern: &str, batch: usize) -> anyhow::Result<Vec<PathBuf>> {
    let (before, after, digits) = match pattern.split_once("%0").or_else(|| pattern.split_once('%')) {
        Some((before, rest)) => match rest.split_once('d') {
            Some((digits, after)) if digits.is_empty() || digits.parse::<usize>().is_ok() => {
                (before, after, digits.parse().unwrap_or(1))
            }
            _ => bail!("-o {pattern:?}: expected a number pattern such as %03d"),
        },
        None if batch == 1 => return Ok(vec![PathBuf::from(pattern)]),
        None => match pattern.rsplit_once('.') {
            Some((stem, _)) => (stem, &pattern[stem.len()..], 3),
            None => (pattern, "", 3),
        },
    };
    let separator = if pattern.contains('%') { "" } else { "-" };
    Ok((0..batch).map(|index| PathBuf::from(format!("{before}{separator}{index:0digits$}{after}"))).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn several_images_are_numbered() {
        let names = |pattern, batch| {
            let names = image_names(pattern, batch).unwrap();
            names.iter().map(|name| name.display().to_string()).collect::<Vec<_>>()
        };
        assert_eq!(names("out.png", 1), ["out.png"]);
        assert_eq!(names("out.png", 2), ["out-000.png", "out-001.png"]);
        assert_eq!(names("a/%03d.png", 2), ["a/000.png", "a/001.png"]);
        assert_eq!(names("x-%d.png", 1), ["x-0.png"]);
        assert!(image_names("x-%s.png", 1).is_err());
    }
}
