//! [`EditRecipe`]: how the tensors of an edit are computed from those of the file.

use crate::products::{kronecker, matrix, tucker};
use candle_core::Tensor;
use clearform_plugin_abi::sdk::{AdapterFile, EditTensors, FileTensor, Result};
use clearform_plugin_abi::tensor::{ElementType, OwnedTensor};

/// How the tensors of an edit are computed from those of the file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EditRecipe {
    /// The tensors that make the change.
    pub form: EditForm,
    /// The magnitude (DoRA).
    pub magnitude: Option<StoredMagnitude>,
}

/// A magnitude in the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StoredMagnitude {
    /// Its index.
    pub index: usize,
    /// Whether it has a norm for each column instead of each row.
    of_columns: bool,
}

/// What makes a change.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum EditForm {
    /// up · down (LoRA), by their indexes in the file.
    LowRank { down: usize, up: usize },
    /// One matrix.
    Value(FactoredMatrix),
    /// w1 ∘ w2 (LoHa; FedPara, arXiv 2108.06098, eq. 4).
    Hadamard([FactoredMatrix; 2]),
    /// w1 ⊗ w2 (LoKr).
    Kronecker([FactoredMatrix; 2]),
}

/// A matrix, by the indexes of its tensors in the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FactoredMatrix {
    /// One tensor.
    Whole(usize),
    /// a · b.
    Product { a: usize, b: usize },
    /// The weight of a convolution from a core (rank, rank, height, width) and factors (rank, outputs) and
    /// (rank, inputs).
    Tucker { core: usize, outputs: usize, inputs: usize },
    /// The same with `up` (outputs, rank, 1, 1) in place of its transpose (LoCon).
    Core { core: usize, up: usize, down: usize },
}

impl FactoredMatrix {
    fn indexes(self) -> Vec<usize> {
        match self {
            Self::Whole(index) => vec![index],
            Self::Product { a, b } => vec![a, b],
            Self::Tucker { core, outputs, inputs } => vec![outputs, inputs, core],
            Self::Core { core, up, down } => vec![down, up, core],
        }
    }

    /// Its rank, if it is a product.
    fn rank(self, infos: &[FileTensor]) -> Option<usize> {
        match self {
            Self::Whole(_) => None,
            Self::Product { b: last, .. } | Self::Tucker { inputs: last, .. } | Self::Core { down: last, .. } => {
                Some(matrix_shape(&infos[last].shape)[0])
            }
        }
    }

    fn shape(self, infos: &[FileTensor]) -> [usize; 2] {
        let shape = |index: usize| matrix_shape(&infos[index].shape);
        let area = |core: usize| infos[core].shape.iter().skip(2).product::<usize>();
        match self {
            Self::Whole(index) => shape(index),
            Self::Product { a, b } => [shape(a)[0], shape(b)[1]],
            Self::Tucker { core, outputs, inputs } => [shape(outputs)[1], shape(inputs)[1].saturating_mul(area(core))],
            Self::Core { core, up, down } => [shape(up)[0], shape(down)[1].saturating_mul(area(core))],
        }
    }

    /// Whether its tensors can be multiplied.
    fn fits(self, infos: &[FileTensor]) -> bool {
        let shape = |index: usize| matrix_shape(&infos[index].shape);
        let core_shape = |core: usize| (infos[core].shape.first().copied(), infos[core].shape.get(1).copied());
        match self {
            Self::Whole(_) => true,
            Self::Product { a, b } => shape(a)[1] == shape(b)[0],
            Self::Tucker { core, outputs, inputs } => {
                core_shape(core) == (Some(shape(outputs)[0]), Some(shape(inputs)[0]))
            }
            Self::Core { core, up, down } => core_shape(core) == (Some(shape(up)[1]), Some(shape(down)[0])),
        }
    }

    fn read(self, file: &AdapterFile) -> Result<Tensor> {
        let read = |index: usize| matrix(&file.read(index)?).map_err(|error| error.to_string());
        let core = |index: usize| {
            let core = file.read(index)?.view().to_candle().and_then(|core| core.to_dtype(candle_core::DType::F32));
            core.and_then(|core| core.flatten_from(2)).map_err(|error| error.to_string())
        };
        let product = match self {
            Self::Whole(index) => return read(index),
            Self::Product { a, b } => read(a)?.matmul(&read(b)?),
            Self::Tucker { core: place, outputs, inputs } => tucker(&core(place)?, &read(outputs)?, &read(inputs)?),
            Self::Core { core: place, up, down } => {
                let transposed = read(up)?.t().and_then(|up| up.contiguous()).map_err(|error| error.to_string())?;
                tucker(&core(place)?, &transposed, &read(down)?)
            }
        };
        product.map_err(|error| error.to_string())
    }
}

impl EditForm {
    /// Indexes of its tensors.
    pub fn indexes(&self) -> Vec<usize> {
        match self {
            Self::LowRank { down, up } => vec![*down, *up],
            Self::Value(factor) => factor.indexes(),
            Self::Hadamard(factors) | Self::Kronecker(factors) => {
                factors.iter().flat_map(|factor| factor.indexes()).collect()
            }
        }
    }

    /// Rows and columns of the change, given the tensors of the file.
    pub fn shape(&self, infos: &[FileTensor]) -> [usize; 2] {
        match self {
            Self::LowRank { down, up } => FactoredMatrix::Product { a: *up, b: *down }.shape(infos),
            Self::Value(factor) => factor.shape(infos),
            Self::Hadamard([w1, _]) => w1.shape(infos),
            Self::Kronecker([w1, w2]) => {
                let [a, b] = w1.shape(infos);
                let [c, d] = w2.shape(infos);
                [a.saturating_mul(c), b.saturating_mul(d)]
            }
        }
    }

    /// The rank that alpha is divided by. A LoKr has none if both of its factors are whole.
    pub fn rank(&self, infos: &[FileTensor]) -> Option<usize> {
        match self {
            Self::LowRank { down, up } => FactoredMatrix::Product { a: *up, b: *down }.rank(infos),
            Self::Value(factor) | Self::Hadamard([factor, _]) => factor.rank(infos),
            Self::Kronecker([w1, w2]) => w2.rank(infos).or_else(|| w1.rank(infos)),
        }
    }

    /// Checks that the tensors are floating-point numbers and fit together.
    ///
    /// # Errors
    /// The shapes or the dtype that were found.
    pub fn check(&self, infos: &[FileTensor]) -> Result<()> {
        let indexes = self.indexes();
        indexes.iter().try_for_each(|index| check_float(&infos[*index]))?;
        let fits = match self {
            Self::LowRank { down, up } => FactoredMatrix::Product { a: *up, b: *down }.fits(infos),
            Self::Value(factor) => factor.fits(infos),
            Self::Kronecker([w1, w2]) => w1.fits(infos) && w2.fits(infos),
            Self::Hadamard([w1, w2]) => w1.fits(infos) && w2.fits(infos) && w1.shape(infos) == w2.shape(infos),
        };
        let shapes = || indexes.iter().map(|index| format!("{:?} {:?}", infos[*index].name, infos[*index].shape));
        if fits {
            Ok(())
        } else {
            Err(format!("its factors do not fit together: {}", shapes().collect::<Vec<_>>().join(", ")))
        }
    }

    /// Reads the tensors of the change, and multiplies out all but LoRAs.
    fn tensors(&self, file: &AdapterFile) -> Result<EditTensors> {
        let value = match self {
            Self::LowRank { down, up } => {
                let down = Some(file.read(*down)?);
                return Ok(EditTensors { down, up: Some(file.read(*up)?), ..EditTensors::default() });
            }
            Self::Value(FactoredMatrix::Whole(index)) => {
                return Ok(EditTensors { value: Some(file.read(*index)?), ..EditTensors::default() });
            }
            Self::Value(factor) => Ok(factor.read(file)?),
            Self::Hadamard([w1, w2]) => w1.read(file)?.mul(&w2.read(file)?),
            Self::Kronecker([w1, w2]) => kronecker(&w1.read(file)?, &w2.read(file)?),
        };
        let value = value.and_then(|value| OwnedTensor::from_candle(&value)).map_err(|error| error.to_string())?;
        Ok(EditTensors { value: Some(value), ..EditTensors::default() })
    }
}

impl EditRecipe {
    /// Computes the tensors of the edit.
    pub fn tensors(&self, file: &AdapterFile) -> Result<EditTensors> {
        let magnitude = self.magnitude.map(|magnitude| magnitude.tensor(file)).transpose()?;
        Ok(EditTensors { magnitude, ..self.form.tensors(file)? })
    }
}

impl StoredMagnitude {
    /// The tensor at `index`. peft's magnitudes are always of rows.
    pub fn new(index: usize, info: &FileTensor) -> Self {
        let is_row = info.shape.len() > 1 && info.shape[0] == 1;
        Self { index, of_columns: is_row && !info.name.contains("lora_magnitude_vector") }
    }

    /// Checks that there is a norm for each row of a weight of `rows` x `columns`, or for each column; a channel of a
    /// convolution is several columns.
    ///
    /// # Errors
    /// The shape or the dtype that was found.
    pub fn check(self, info: &FileTensor, [rows, columns]: [usize; 2]) -> Result<()> {
        check_float(info)?;
        let count = info.shape.iter().product::<usize>();
        let fits = if self.of_columns { count > 0 && columns.is_multiple_of(count) } else { count == rows };
        let FileTensor { name, shape, .. } = info;
        let expected = format!("expected the norms of {rows} rows or {columns} columns");
        if fits { Ok(()) } else { Err(format!("{name:?}: {expected}, found {shape:?}")) }
    }

    /// The norms as the interface has them: (outputs), or (1, inputs). Of convolutions, peft stores them as
    /// (1, outputs, 1, 1) and LyCORIS as (outputs, 1, 1, 1) or (1, inputs, 1, 1).
    fn tensor(self, file: &AdapterFile) -> Result<OwnedTensor> {
        let reshaped = file.read(self.index)?.view().to_candle().and_then(|norms| match self.of_columns {
            true => norms.reshape((1, ())),
            false => norms.flatten_all(),
        });
        reshaped.and_then(|norms| OwnedTensor::from_candle(&norms)).map_err(|error| error.to_string())
    }
}

/// Checks that a tensor has floating-point numbers.
///
/// # Errors
/// The dtype that was found.
pub fn check_float(info: &FileTensor) -> Result<()> {
    use ElementType::{Bf16, F16, F32, F64};
    match info.element {
        Some(F16 | Bf16 | F32 | F64) => Ok(()),
        Some(other) => {
            let found = other.name();
            Err(format!(
                "{:?}: expected floating-point numbers, found {found}: use a file in bf16, fp16, fp32 or fp8",
                info.name
            ))
        }
        None => Err(format!("{:?}: it is stored in a format that the plugin interface does not support", info.name)),
    }
}

/// Rows, and elements of a row. A scalar has one row.
pub fn matrix_shape(shape: &[usize]) -> [usize; 2] {
    [shape.first().copied().unwrap_or(1), shape.iter().skip(1).product()]
}
