//! [`MappedSource`]: a source whose tensors are assembled from byte ranges of another source's tensors when they are
//! read.
//!
//! Renaming, splitting, joining and swapping rows, copying and reshaping are the same operation here: an output is a
//! sequence of byte ranges of inputs, which may be transposed when they are read. Values are never interpreted.

use crate::error::{LayoutError, Result};
use crate::mapping::load_report::{LoadReport, TensorOutcome};
use candle_core::Tensor;
use clearform_weights::{QuantizedMatrix, RawTensor, TensorInfo, TensorSource, WeightsError};
use std::collections::BTreeMap;
use std::ops::Range;

/// A checkpoint under canonical names.
pub type CanonicalSource<S> = MappedSource<S>;

/// A canonical source under the names of another layout.
pub type ExportedSource<S> = MappedSource<S>;

/// A source seen through a layout's rules.
#[derive(Debug)]
pub struct MappedSource<S> {
    source: S,
    tensors: BTreeMap<String, TensorAssembly>,
    load_report: LoadReport,
}

impl<S> MappedSource<S> {
    pub(crate) fn new(source: S, tensors: BTreeMap<String, TensorAssembly>, load_report: LoadReport) -> Self {
        Self { source, tensors, load_report }
    }

    /// What became of each input tensor, and what is missing.
    pub fn load_report(&self) -> &LoadReport {
        &self.load_report
    }

    /// The source that tensors are read from.
    pub fn source(&self) -> &S {
        &self.source
    }

    /// Records why an input is not used that the rules did not see.
    pub(crate) fn skip(&mut self, name: &str, reason: &str) {
        self.load_report.outcomes.insert(name.to_owned(), TensorOutcome::Skipped { reason: reason.to_owned() });
    }

    /// Itself, if no tensor is missing or misshapen. The source may have further tensors.
    ///
    /// # Errors
    /// [`LayoutError::Incomplete`], which names the missing and misshapen tensors.
    pub fn require_sufficient(self) -> Result<Self> {
        match self.load_report.is_sufficient() {
            true => Ok(self),
            false => Err(LayoutError::Incomplete(Box::new(self.load_report))),
        }
    }

    /// Itself, if no tensor is missing or misshapen and every tensor of the source is understood.
    ///
    /// # Errors
    /// [`LayoutError::Incomplete`], which names the others.
    pub fn require_complete(self) -> Result<Self> {
        match self.load_report.is_complete() {
            true => Ok(self),
            false => Err(LayoutError::Incomplete(Box::new(self.load_report))),
        }
    }
}

impl<S: TensorSource> MappedSource<S> {
    fn find(&self, name: &str) -> std::result::Result<&TensorAssembly, WeightsError> {
        self.tensors.get(name).ok_or_else(|| WeightsError::Missing { name: name.to_owned() })
    }

    /// The rows of an input that `piece` of a matrix is; `None` if it is none of its rows.
    fn rows_of(&self, piece: &ByteSlice, assembly: &TensorAssembly) -> Option<Range<usize>> {
        let input = self.source.info(&piece.tensor)?;
        let ([_, columns], [rows, input_columns]) = (&assembly.info.shape[..], &input.shape[..]) else { return None };
        let row = size(&input).checked_div(*rows).filter(|row| *row > 0)?;
        let is_rows = columns == input_columns && !assembly.transposed;
        let is_whole = piece.bytes.start.is_multiple_of(row) && piece.bytes.end.is_multiple_of(row);
        (is_rows && is_whole).then(|| piece.bytes.start / row..piece.bytes.end / row)
    }

    /// Tensors that the layout stores once must be equal, or values would be lost silently.
    fn check_duplicates(&self, assembly: &TensorAssembly) -> std::result::Result<(), WeightsError> {
        let (Some(original), false) = (&assembly.original, assembly.duplicates.is_empty()) else { return Ok(()) };
        let bytes = self.source.read(original)?.bytes;
        for duplicate in &assembly.duplicates {
            if self.source.read(duplicate)?.bytes != bytes {
                let reason = format!("it differs from {original:?}, and this layout stores both as one tensor");
                return Err(WeightsError::BadTensor { name: duplicate.clone(), reason });
            }
        }
        Ok(())
    }
}

impl<S: TensorSource> TensorSource for MappedSource<S> {
    fn tensors(&self) -> Vec<TensorInfo> {
        self.tensors.values().map(|assembly| assembly.info.clone()).collect()
    }

    fn info(&self, name: &str) -> Option<TensorInfo> {
        self.tensors.get(name).map(|assembly| assembly.info.clone())
    }

    fn read(&self, name: &str) -> clearform_weights::Result<RawTensor> {
        let assembly = self.find(name)?;
        self.check_duplicates(assembly)?;
        let TensorAssembly { info, pieces, .. } = assembly;
        let mut bytes = Vec::new();
        for (index, ByteSlice { tensor, bytes: range }) in pieces.iter().enumerate() {
            let piece = self.source.read_range(tensor, range.clone())?;
            // Most tensors are one piece, which then needs no copy.
            if index == 0 {
                bytes = piece;
                bytes.reserve_exact(pieces[1..].iter().map(|piece| piece.bytes.len()).sum());
            } else {
                bytes.extend(piece);
            }
        }
        let bytes = if assembly.transposed { transpose(&bytes, info) } else { bytes };
        Ok(RawTensor { dtype: info.dtype, shape: info.shape.clone(), bytes })
    }

    /// Rows that are whole rows of inputs keep their format.
    fn quantized_rows(&self, name: &str, rows: Range<usize>) -> clearform_weights::Result<Option<QuantizedMatrix>> {
        let assembly = self.find(name)?;
        self.check_duplicates(assembly)?;
        let mut parts = Vec::new();
        let mut first = 0;
        for piece in &assembly.pieces {
            let Some(own) = self.rows_of(piece, assembly) else { return Ok(None) };
            let wanted = rows.start.clamp(first, first + own.len())..rows.end.clamp(first, first + own.len());
            if !wanted.is_empty() {
                let wanted = own.start + wanted.start - first..own.start + wanted.end - first;
                let Some(part) = self.source.quantized_rows(&piece.tensor, wanted)? else { return Ok(None) };
                parts.push(part);
            }
            first += own.len();
        }
        Ok(QuantizedMatrix::joined(parts))
    }

    /// A tensor that is a whole input shares its storage with the source.
    fn tensor(&self, name: &str) -> clearform_weights::Result<Tensor> {
        let assembly = self.find(name)?;
        self.check_duplicates(assembly)?;
        let TensorAssembly { info, original, .. } = assembly;
        match original {
            Some(original) => Ok(self.source.tensor(original)?.reshape(info.shape.as_slice())?),
            None => self.read(name)?.to_tensor(name),
        }
    }
}

/// An output tensor and the pieces that it is made of.
#[derive(Debug, Clone)]
pub(crate) struct TensorAssembly {
    pub info: TensorInfo,
    pieces: Vec<ByteSlice>,
    /// The input that it is, if it only has another name or shape.
    original: Option<String>,
    /// Inputs that must be equal to `original`.
    duplicates: Vec<String>,
    /// Whether the pieces are the matrix with rows as columns.
    transposed: bool,
}

/// A range of bytes of an input.
#[derive(Debug, Clone)]
struct ByteSlice {
    tensor: String,
    bytes: Range<usize>,
}

impl TensorAssembly {
    /// All of `input` under another name.
    pub fn whole(input: &TensorInfo, name: &str) -> Self {
        Self {
            info: TensorInfo { name: name.to_owned(), ..input.clone() },
            pieces: vec![ByteSlice { tensor: input.name.clone(), bytes: 0..size(input) }],
            original: Some(input.name.clone()),
            duplicates: Vec::new(),
            transposed: false,
        }
    }

    /// The first of `inputs`, which must all be equal, under another name.
    pub fn picked(inputs: &[&TensorInfo], name: &str) -> std::result::Result<Self, String> {
        let [first, others @ ..] = inputs else { return Err("nothing to pick from".to_owned()) };
        if let Some(other) = others.iter().find(|other| (&other.shape, other.dtype) != (&first.shape, first.dtype)) {
            let expected = format!("expected {:?} in {:?}", first.shape, first.dtype);
            let found = format!("found {:?} in {:?}", other.shape, other.dtype);
            return Err(format!("it is stored as one tensor with {:?}: {expected}, {found}", other.name));
        }
        let duplicates = others.iter().map(|other| other.name.clone()).collect();
        Ok(Self { duplicates, ..Self::whole(first, name) })
    }

    /// `input` with the second half of its rows before the first.
    pub fn swapped(input: &TensorInfo, name: &str) -> std::result::Result<Self, String> {
        let [first, second] = &Self::split(input, &[name.to_owned(), name.to_owned()], &[1, 1])?[..] else {
            return Err("its rows do not have two halves".to_owned());
        };
        let pieces = [&second.pieces[..], &first.pieces[..]].concat();
        Ok(Self { pieces, original: None, ..Self::whole(input, name) })
    }

    /// The matrix `input` with its rows as columns.
    pub fn transposed(input: &TensorInfo, name: &str) -> std::result::Result<Self, String> {
        let whole = Self::whole(input, name);
        match &input.shape[..] {
            [rows, columns] if input.dtype.bitsize().is_multiple_of(8) => {
                let info = TensorInfo { shape: vec![*columns, *rows], ..whole.info };
                Ok(Self { info, original: None, transposed: true, ..whole })
            }
            _ => Err(format!("its shape {:?} in {:?} cannot be transposed", input.shape, input.dtype)),
        }
    }

    /// `input` split by rows into tensors called `names`, in the proportions `shares`.
    pub fn split(input: &TensorInfo, names: &[String], shares: &[usize]) -> std::result::Result<Vec<Self>, String> {
        let total: usize = shares.iter().sum();
        let rows = input.shape.first().copied().unwrap_or(0);
        let unit = rows / total;
        if !rows.is_multiple_of(total) || !size(input).is_multiple_of(total) || rows == 0 {
            return Err(format!("its shape {:?} cannot be split by rows {shares:?}", input.shape));
        }
        let mut row = 0;
        let next_rows = |(name, share): (&String, &usize)| {
            let begin = row;
            row += share * unit;
            Self::rows(input, name, begin..row)
        };
        Ok(names.iter().zip(shares).map(next_rows).collect())
    }

    /// The rows of all `inputs` in order; their numbers must have the proportions `shares`.
    pub fn join(inputs: &[&TensorInfo], name: &str, shares: &[usize]) -> std::result::Result<Self, String> {
        let [first, ..] = inputs else { return Err("nothing to join".to_owned()) };
        let rows = |input: &TensorInfo| input.shape.first().copied().unwrap_or(0);
        let unit = rows(first) / shares[0];
        for (input, share) in inputs.iter().zip(shares) {
            if input.dtype != first.dtype {
                let [expected, found] = [first.dtype, input.dtype];
                return Err(format!("{expected:?} and {found:?} cannot be joined: convert them to the same dtype"));
            }
            if input.shape.get(1..) != first.shape.get(1..) || rows(input) != unit * share || unit == 0 {
                return Err(format!("{:?} and {:?} cannot be joined by rows {shares:?}", first.shape, input.shape));
            }
        }
        let mut info = TensorInfo { name: name.to_owned(), ..(*first).clone() };
        info.shape[0] = inputs.iter().map(|input| rows(input)).sum();
        let pieces = inputs.iter().flat_map(|input| Self::whole(input, name).pieces).collect();
        Ok(Self { info, pieces, original: None, duplicates: Vec::new(), transposed: false })
    }

    fn rows(input: &TensorInfo, name: &str, rows: Range<usize>) -> Self {
        let mut info = TensorInfo { name: name.to_owned(), ..input.clone() };
        let row = size(input) / input.shape[0];
        info.shape[0] = rows.len();
        let pieces = vec![ByteSlice { tensor: input.name.clone(), bytes: rows.start * row..rows.end * row }];
        Self { info, pieces, original: None, duplicates: Vec::new(), transposed: false }
    }

    /// Adds extents of 1 before the others until the tensor has `rank` of them.
    pub fn extend_to(&mut self, rank: usize) {
        let missing = rank.saturating_sub(self.info.shape.len());
        self.info.shape.splice(0..0, std::iter::repeat_n(1, missing));
    }

    /// (name, assembly) with `prefix` before the name.
    pub fn with_prefix(mut self, prefix: &str) -> (String, Self) {
        self.info.name.insert_str(0, prefix);
        (self.info.name.clone(), self)
    }

    /// The pieces in order: (input, bytes of it).
    pub fn pieces(&self) -> impl Iterator<Item = (&str, &Range<usize>)> {
        self.pieces.iter().map(|piece| (piece.tensor.as_str(), &piece.bytes))
    }

    /// The input of the first piece.
    pub fn first_input(&self) -> &str {
        self.pieces.first().map_or("", |piece| &piece.tensor)
    }
}

/// The values of a matrix that becomes `info`, whose columns are its rows.
fn transpose(bytes: &[u8], info: &TensorInfo) -> Vec<u8> {
    let [rows, columns] = info.shape[..] else { return bytes.to_vec() };
    let width = info.dtype.bitsize() / 8;
    let value = |row: usize, column: usize| &bytes[(column * rows + row) * width..][..width];
    (0..rows).flat_map(|row| (0..columns).flat_map(move |column| value(row, column))).copied().collect()
}

fn size(info: &TensorInfo) -> usize {
    info.shape.iter().product::<usize>() * info.dtype.bitsize() / 8
}
