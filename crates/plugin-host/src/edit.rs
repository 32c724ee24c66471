//! [`Edit`]: one edit of a parameter as a plugin describes it, and its tensors. Everything that comes from the plugin
//! is checked here.

use candle_core::Tensor;
use clearform_layout::glob;
use clearform_plugin_abi::{
    ClearformEdit, EDIT_DECOMPOSED, EDIT_DELTA, EDIT_LOW_RANK, EDIT_REPLACE, EDIT_SCALE, WHOLE_PARAMETER,
};

/// What an edit does to a weight W.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EditKind {
    /// W + scale · up · down.
    LowRank,
    /// W + scale · value.
    Delta,
    /// `value` replaces W.
    Replace,
    /// Each row of W times its factor.
    Scale,
}

/// One edit of one parameter.
#[derive(Debug, Clone, PartialEq)]
pub struct Edit {
    /// What the edit does.
    pub kind: EditKind,
    /// Whether the edit also sets the norms of the edited weight (DoRA).
    pub decomposed: bool,
    /// Component of the pipeline; a trailing `*` matches any ending.
    pub component: String,
    /// Name of the parameter, in any layout.
    pub parameter: String,
    /// First row that is edited; `None` for the whole parameter.
    pub first_row: Option<usize>,
    /// Number of edited rows, and of elements in a row.
    pub shape: [usize; 2],
    /// The adapter's own scale.
    pub scale: f64,
    /// Indexes of the file's tensors that the edit is made from.
    pub sources: Vec<usize>,
}

/// Tensors of an edit, on the CPU.
#[derive(Debug, Clone)]
pub(crate) enum EditValues {
    /// Factors (rank, inputs) and (outputs, rank).
    LowRank { down: Tensor, up: Tensor },
    /// A value for each element, or a factor for each row.
    Value(Tensor),
}

impl Edit {
    /// Copies an edit of a file with `tensors` tensors.
    ///
    /// # Safety
    /// The pointers of `raw` are valid.
    ///
    /// # Errors
    /// What is wrong with the edit.
    pub(crate) unsafe fn from_raw(raw: &ClearformEdit, tensors: usize) -> Result<Self, String> {
        // SAFETY: guaranteed by the caller.
        let (component, parameter) = unsafe { (raw.component.as_str(), raw.parameter.as_str()) };
        let (Some(component), Some(parameter)) = (component, parameter) else {
            return Err("its names are not UTF-8".to_owned());
        };
        if raw.flags & !EDIT_DECOMPOSED != 0 {
            return Err(format!("unknown flags {:#x}", raw.flags));
        }
        if !raw.scale.is_finite() {
            return Err(format!("expected a finite scale, found {}", raw.scale));
        }
        Ok(Self {
            kind: EditKind::from_raw(raw.kind)?,
            decomposed: raw.flags & EDIT_DECOMPOSED != 0,
            component: component.to_owned(),
            parameter: parameter.to_owned(),
            first_row: first_row(raw.first_row)?,
            shape: [raw.rows as usize, raw.columns as usize],
            scale: raw.scale,
            // SAFETY: guaranteed by the caller.
            sources: unsafe { sources(raw, tensors) }?,
        })
    }

    /// Moves the edit to `component`, for which its file was saved, unless its name states another text encoder. Names
    /// without a component are taken for the transformer's.
    pub(crate) fn set_component(&mut self, component: &str) {
        if self.component == "transformer" || glob(&self.component, component) {
            component.clone_into(&mut self.component);
        }
    }

    /// The parameter with its component in front.
    pub(crate) fn qualified_name(&self) -> String {
        format!("{}.{}", self.component, self.parameter)
    }
}

impl EditKind {
    fn from_raw(kind: u32) -> Result<Self, String> {
        match kind {
            EDIT_LOW_RANK => Ok(Self::LowRank),
            EDIT_DELTA => Ok(Self::Delta),
            EDIT_REPLACE => Ok(Self::Replace),
            EDIT_SCALE => Ok(Self::Scale),
            other => Err(format!("unknown kind {other}")),
        }
    }
}

fn first_row(row: i64) -> Result<Option<usize>, String> {
    match row {
        WHOLE_PARAMETER => Ok(None),
        row => usize::try_from(row).map(Some).map_err(|_| format!("its first row is {row}")),
    }
}

/// # Safety
/// The array of `raw` is valid.
unsafe fn sources(raw: &ClearformEdit, tensors: usize) -> Result<Vec<usize>, String> {
    if raw.source_count > tensors || (raw.source_count > 0 && raw.sources.is_null()) {
        return Err(format!("it is made from {} tensors, but the file has {tensors}", raw.source_count));
    }
    let sources: Vec<usize> = match raw.source_count {
        0 => Vec::new(),
        // SAFETY: guaranteed by the caller; the pointer is not null.
        count => unsafe { std::slice::from_raw_parts(raw.sources, count) }.to_vec(),
    };
    match sources.iter().find(|index| **index >= tensors) {
        Some(index) => {
            Err(format!("it is made from the tensor with index {index}, but the file has {tensors} tensors"))
        }
        None => Ok(sources),
    }
}

impl EditValues {
    /// Checks the tensors against the shape that `edit` states.
    ///
    /// # Errors
    /// The expected and the found shapes.
    pub(crate) fn check(&self, edit: &Edit) -> Result<(), String> {
        let [rows, columns] = edit.shape;
        let fits = match self {
            Self::LowRank { down, up } => factors_fit(down, up, edit.shape),
            Self::Value(value) if edit.kind == EditKind::Scale => value.elem_count() == rows,
            Self::Value(value) => Some(value.elem_count()) == rows.checked_mul(columns),
        };
        if fits {
            return Ok(());
        }
        let shapes: Vec<&[usize]> = match self {
            Self::LowRank { down, up } => vec![down.dims(), up.dims()],
            Self::Value(value) => vec![value.dims()],
        };
        Err(format!("expected tensors for a weight of {rows} x {columns}, found the shapes {shapes:?}"))
    }
}

/// Whether up (rows, rank) times down (rank, columns) has the shape (rows, columns). Factors of convolutions have
/// further dimensions, which count as columns.
fn factors_fit(down: &Tensor, up: &Tensor, [rows, columns]: [usize; 2]) -> bool {
    let rank = down.dims().first().copied().unwrap_or(0);
    rank > 0
        && up.rank() >= 2
        && down.rank() >= 2
        && up.dims()[0] == rows
        && Some(up.elem_count()) == rows.checked_mul(rank)
        && Some(down.elem_count()) == rank.checked_mul(columns)
}
