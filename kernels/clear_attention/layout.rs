//! What [`VisitLists`](super::VisitLists) are made for, a [`SequenceLayout`], and made of, [`WorkItem`] and
//! [`ListEntry`], as the kernels read them.

/// Work of one thread block: rows `[first, first + count)` against entries `[begin, end)`. With `slot >= 0` the result
/// is a partial one (a split of a long list), stored in that slot. In a join, `[begin, end)` are the slots to merge.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WorkItem {
    /// First row.
    pub first: i32,
    /// Rows, at most 64.
    pub count: i32,
    /// First entry.
    pub begin: i32,
    /// One past the last entry.
    pub end: i32,
    /// Slot of the partial result, or -1.
    pub slot: i32,
}

/// A tile of columns to visit: `[first, first + count)`.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ListEntry {
    /// First column.
    pub first: i32,
    /// Columns, at most 64.
    pub count: i32,
    /// [`ListEntry::WHOLE`], the index of a mask, or -2 - i for the mask of text tile i of a batch entry ([`padding`]).
    ///
    /// [`padding`]: super::padding
    pub mask: i32,
}

impl ListEntry {
    /// No mask: each row sees each of 64 columns.
    pub const WHOLE: i32 = -1;
}

/// What the rows of the lists are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ListRows {
    /// Queries, which visit keys: for the forward and the gradient of the queries.
    Queries,
    /// Keys, which visit queries: for the gradients of keys and values.
    Keys,
}

/// The number of text tokens, and whether each batch entry has padding of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TextPadding {
    /// No padding.
    Whole(usize),
    /// Padded; each call brings its masks ([`padding`](super::padding)).
    Padded(usize),
}

impl TextPadding {
    /// Text tokens, padding included.
    pub fn tokens(self) -> usize {
        let (Self::Whole(tokens) | Self::Padded(tokens)) = self;
        tokens
    }
}

/// The sequence of a call, [text, image, pooled], and the window in which image tokens attend to each other.
#[derive(Debug, Clone, Copy)]
pub struct SequenceLayout<'a> {
    /// Text tokens, which attend to everything except pooled context, and which everything attends to.
    pub text: TextPadding,
    /// Row and column of each image token, in the order of the sequence.
    pub positions: &'a [(i32, i32)],
    /// Keys of pooled context, which image tokens attend to.
    pub pooled: usize,
    /// Image tokens attend to each other where their squared distance is below it; none: everywhere.
    pub limit: Option<i32>,
}
