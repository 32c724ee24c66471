//! [`RowCopy`]: the copies that join and cut tensors on a GPU, as plain numbers.

/// The longest distance between rows that the driver copies in two dimensions (`CU_DEVICE_ATTRIBUTE_MAX_PITCH`).
const MAX_PITCH: usize = i32::MAX as usize;

/// Rows of bytes, copied from one memory to another. Offsets and pitches (distances between the beginnings of rows) are in
/// bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct RowCopy {
    /// Offset of the first row in the source.
    pub from: usize,
    /// Pitch in the source.
    pub from_pitch: usize,
    /// Offset of the first row in the destination.
    pub to: usize,
    /// Pitch in the destination.
    pub to_pitch: usize,
    /// Bytes of a row.
    pub width: usize,
    /// Number of rows.
    pub rows: usize,
}

impl RowCopy {
    /// Copies of contiguous tensors of `shapes` next to each other along dimension `dim`, one for each of them. The shapes
    /// differ in that dimension only; elements have `size` bytes.
    pub fn joining(shapes: &[&[usize]], dim: usize, size: usize) -> Vec<Self> {
        let width = |shape: &&[usize]| shape[dim..].iter().product::<usize>() * size;
        let to_pitch = shapes.iter().map(width).sum();
        let mut to = 0;
        let copy = |shape: &&[usize]| {
            let width = width(shape);
            let copy = Self { from: 0, from_pitch: width, to, to_pitch, width, rows: shape[..dim].iter().product() };
            to += width;
            copy
        };
        shapes.iter().map(copy).collect()
    }

    /// A copy of elements `start..start + length` of dimension `dim` of a contiguous tensor.
    pub fn cutting(shape: &[usize], dim: usize, [start, length]: [usize; 2], size: usize) -> Self {
        let inner = shape[dim + 1..].iter().product::<usize>() * size;
        Self {
            from: start * inner,
            from_pitch: shape[dim] * inner,
            to: 0,
            to_pitch: length * inner,
            width: length * inner,
            rows: shape[..dim].iter().product(),
        }
    }

    /// The same as copies that the driver accepts: rows that follow each other without a gap are one, and rows that are
    /// further apart than it supports are copied one by one.
    pub fn accepted(self) -> Vec<Self> {
        let Self { from, from_pitch, to, to_pitch, width, rows } = self;
        let single = |from, to, width| Self { from, from_pitch: width, to, to_pitch: width, width, rows: 1 };
        if from_pitch == width && to_pitch == width {
            return vec![single(from, to, width * rows)];
        }
        if from_pitch.max(to_pitch) <= MAX_PITCH {
            return vec![self];
        }
        (0..rows).map(|row| single(from + row * from_pitch, to + row * to_pitch, width)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Tokens of an image of 8192 x 8192 pixels in FLUX, and those of its text.
    const IMAGE: usize = 512 * 512;
    const TEXT: usize = 512;
    const BF16: usize = 2;

    /// Copies within host memory.
    fn run(copies: &[RowCopy], from: &[u8], to: &mut [u8]) {
        for copy in copies {
            for row in 0..copy.rows {
                let [source, target] = [copy.from + row * copy.from_pitch, copy.to + row * copy.to_pitch];
                to[target..target + copy.width].copy_from_slice(&from[source..source + copy.width]);
            }
        }
    }

    #[test]
    fn joined_and_cut_tensors_are_those_of_narrow() {
        let first: Vec<u8> = (0..12).collect(); // (2, 3, 2)
        let second: Vec<u8> = (100..116).collect(); // (2, 4, 2)
        let mut joined = [0; 28]; // (2, 7, 2)
        let copies = RowCopy::joining(&[&[2, 3, 2], &[2, 4, 2]], 1, 1);
        run(&copies[0].accepted(), &first, &mut joined);
        run(&copies[1].accepted(), &second, &mut joined);
        assert_eq!(joined[..14], [&first[..6], &second[..8]].concat());
        assert_eq!(joined[14..], [&first[6..], &second[8..]].concat());
        let mut cut = [0; 16];
        run(&RowCopy::cutting(&[2, 7, 2], 1, [3, 4], 1).accepted(), &joined, &mut cut);
        assert_eq!(cut.to_vec(), second);
    }

    #[test]
    fn rows_without_gaps_are_one_copy() {
        let copies = RowCopy::joining(&[&[1, TEXT, 3072], &[1, IMAGE, 3072]], 1, BF16);
        assert!(copies.iter().all(|copy| copy.accepted().len() == 1 && copy.accepted()[0].rows == 1));
        let inside = RowCopy::joining(&[&[2, 4, 3], &[2, 4, 5]], 2, BF16);
        assert_eq!(inside[1].accepted(), [RowCopy { rows: 8, from_pitch: 10, to: 6, to_pitch: 16, ..inside[1] }]);
    }

    /// Text and image, and attention and MLP of a single-stream block, of which candle's 32-bit copies lose the end.
    #[test]
    fn every_byte_of_8k_tensors_is_copied_once() {
        for batch in 1..=4 {
            for (shapes, dim) in [
                ([[batch, TEXT, 24, 128], [batch, IMAGE, 24, 128]], 1),
                ([[batch, IMAGE, 1, 3072], [batch, IMAGE, 1, 12288]], 3),
            ] {
                let shapes = shapes.each_ref().map(|shape| &shape[..]);
                let bytes = |shape: &[usize]| shape.iter().product::<usize>() * BF16;
                let copies = RowCopy::joining(&shapes, dim, BF16);
                let total = bytes(shapes[0]) + bytes(shapes[1]);
                let [first, second] = [copies[0], copies[1]];
                assert_eq!([first.to, second.to, second.to + second.width], [0, first.width, first.to_pitch]);
                assert_eq!([first.to_pitch, first.rows], [second.to_pitch, second.rows]);
                assert_eq!(first.to_pitch * first.rows, total);
                let accepted: Vec<RowCopy> = copies.into_iter().flat_map(RowCopy::accepted).collect();
                let end = |copy: &RowCopy| copy.to + (copy.rows - 1) * copy.to_pitch + copy.width;
                assert_eq!(accepted.iter().map(end).max(), Some(total), "batch {batch}, dimension {dim}");
                assert!(accepted.iter().all(|copy| copy.rows == 1 || copy.to_pitch.max(copy.from_pitch) <= MAX_PITCH));
                let image = RowCopy::cutting(&[batch, TEXT + IMAGE, 24, 128], 1, [TEXT, IMAGE], BF16);
                let last = image.from + (image.rows - 1) * image.from_pitch + image.width;
                assert_eq!(last, bytes(&[batch, TEXT + IMAGE, 24, 128]));
            }
        }
    }

    #[test]
    fn rows_too_far_apart_are_copied_one_by_one() {
        let copies = RowCopy::joining(&[&[3, TEXT, 4096], &[3, IMAGE, 4096]], 1, BF16);
        let rows = copies[1].accepted();
        assert_eq!(rows.len(), 3);
        assert_eq!(rows[2].to, 2 * (TEXT + IMAGE) * 8192 + TEXT * 8192);
    }
}
