//! EXIF with a user comment, as AUTOMATIC1111's web UI writes the parameters of an image into JPEG and WebP files.

/// Tags of the EXIF standard: where the EXIF directory is, and the user comment in it.
const EXIF_DIRECTORY: u16 = 0x8769;
const USER_COMMENT: u16 = 0x9286;

/// The types of their values.
const LONG: u16 = 4;
const UNDEFINED: u16 = 7;

/// What a comment in UTF-16 begins with.
const UNICODE: &[u8] = b"UNICODE\0";

/// Bytes of a directory with one entry: its count, the entry, and the place of the next directory.
const DIRECTORY: u32 = 2 + 12 + 4;

/// Bytes of TIFF's header.
const HEADER: u32 = 8;

/// EXIF data with `comment`, in TIFF's form. Big-endian: programs read the comment so whatever the header says.
pub fn with_user_comment(comment: &str) -> Vec<u8> {
    let text: Vec<u8> = comment.encode_utf16().flat_map(u16::to_be_bytes).collect();
    let length = (UNICODE.len() + text.len()) as u32;
    let mut bytes = b"MM\0\x2a".to_vec();
    bytes.extend(HEADER.to_be_bytes());
    bytes.extend(directory(EXIF_DIRECTORY, LONG, 1, HEADER + DIRECTORY));
    bytes.extend(directory(USER_COMMENT, UNDEFINED, length, HEADER + 2 * DIRECTORY));
    bytes.extend(UNICODE);
    bytes.extend(text);
    bytes
}

/// A directory with one entry.
fn directory(tag: u16, kind: u16, count: u32, value: u32) -> Vec<u8> {
    let mut bytes = 1u16.to_be_bytes().to_vec();
    bytes.extend(tag.to_be_bytes());
    bytes.extend(kind.to_be_bytes());
    bytes.extend(count.to_be_bytes());
    bytes.extend(value.to_be_bytes());
    bytes.extend(0u32.to_be_bytes());
    bytes
}

/// The user comment in EXIF data, in Unicode or ASCII; `None` if there is none.
pub fn user_comment(exif: &[u8]) -> Option<String> {
    let tiff = Tiff { bytes: exif, is_little_endian: exif.get(..2)? == b"II" };
    let (_, exif_directory) = tiff.entry(tiff.long(4)?, EXIF_DIRECTORY)?;
    let (length, start) = tiff.entry(exif_directory, USER_COMMENT)?;
    let comment = exif.get(start as usize..)?.get(..length as usize)?;
    let (code, text) = comment.split_at_checked(UNICODE.len())?;
    if code != UNICODE {
        return std::str::from_utf8(text).ok().map(|text| text.trim_end_matches('\0').to_owned());
    }
    // Programs differ in whether the order of bytes is that of the header or always the same: letters show it.
    let is_little_endian = matches!(text, [letter, 0, ..] if *letter != 0);
    let read = if is_little_endian { u16::from_le_bytes } else { u16::from_be_bytes };
    let units: Vec<u16> = text.chunks_exact(2).map(|pair| read([pair[0], pair[1]])).collect();
    String::from_utf16(&units).ok()
}

/// EXIF data of either byte order.
struct Tiff<'a> {
    bytes: &'a [u8],
    is_little_endian: bool,
}

impl Tiff<'_> {
    /// Count and value of the entry `wanted` of the directory at `start`.
    fn entry(&self, start: u32, wanted: u16) -> Option<(u32, u32)> {
        let entries = u32::from(self.short(start)?);
        let mut places = (0..entries).map(|index| start + 2 + 12 * index);
        let found = places.find(|place| self.short(*place) == Some(wanted))?;
        Some((self.long(found + 4)?, self.long(found + 8)?))
    }

    fn short(&self, at: u32) -> Option<u16> {
        let bytes: [u8; 2] = self.bytes.get(at as usize..)?.get(..2)?.try_into().ok()?;
        Some(if self.is_little_endian { u16::from_le_bytes(bytes) } else { u16::from_be_bytes(bytes) })
    }

    fn long(&self, at: u32) -> Option<u32> {
        let bytes: [u8; 4] = self.bytes.get(at as usize..)?.get(..4)?.try_into().ok()?;
        Some(if self.is_little_endian { u32::from_le_bytes(bytes) } else { u32::from_be_bytes(bytes) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_comment_reads_back() {
        for comment in ["", "a fox", "F\u{fc}chse \u{72d0} \u{1f98a}\nSteps: 20"] {
            assert_eq!(user_comment(&with_user_comment(comment)).as_deref(), Some(comment));
        }
    }

    #[test]
    fn cut_data_is_no_comment() {
        let whole = with_user_comment("a fox");
        for length in 0..whole.len() {
            assert_eq!(user_comment(&whole[..length]), None, "{length}");
        }
        let mut far = whole;
        far[4..8].copy_from_slice(&u32::MAX.to_be_bytes());
        assert_eq!(user_comment(&far), None);
    }
}
