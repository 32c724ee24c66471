//! [`EditRecipe`]: how the tensors of an edit are computed from those of the file.

use crate::products::{hadamard, kronecker};
use clearform_plugin_abi::sdk::{AdapterFile, EditTensors, FileTensor, Result};
use clearform_plugin_abi::tensor::OwnedTensor;

/// How the tensors of an edit are computed from those of the file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EditRecipe {
    /// The tensors that make the change.
    pub form: EditForm,
    /// The magnitude (DoRA).
    pub magnitude: Option<usize>,
}

/// The tensors that make a change, by their indexes in the file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum EditForm {
    /// up · down (LoRA).
    LowRank { down: usize, up: usize },
    /// One tensor as it is.
    Value(usize),
    /// (a · b) ∘ (a · b) (LoHa).
    Hadamard { w1: [usize; 2], w2: [usize; 2] },
    /// w1 ⊗ w2, each of one tensor or of two factors (LoKr).
    Kronecker { w1: Vec<usize>, w2: Vec<usize> },
}

impl EditForm {
    /// Indexes of its tensors.
    pub fn indexes(&self) -> Vec<usize> {
        match self {
            Self::LowRank { down, up } => vec![*down, *up],
            Self::Value(index) => vec![*index],
            Self::Hadamard { w1, w2 } => [*w1, *w2].concat(),
            Self::Kronecker { w1, w2 } => [w1.as_slice(), w2].concat(),
        }
    }

    /// Rows and columns of the change, given the tensors of the file.
    pub fn shape(&self, infos: &[FileTensor]) -> [usize; 2] {
        let matrix_of = |index: usize| matrix_shape(&infos[index].shape);
        let product_of = |factors: &[usize]| match factors {
            [whole] => matrix_of(*whole),
            [a, b, ..] => [matrix_of(*a)[0], matrix_of(*b)[1]],
            [] => [0, 0],
        };
        match self {
            Self::LowRank { down, up } => product_of(&[*up, *down]),
            Self::Value(index) => matrix_of(*index),
            Self::Hadamard { w1, .. } => product_of(w1),
            Self::Kronecker { w1, w2 } => {
                let [a, b] = product_of(w1);
                let [c, d] = product_of(w2);
                [a.saturating_mul(c), b.saturating_mul(d)]
            }
        }
    }

    /// Reads the tensors of the change, and multiplies out LoHa and LoKr.
    fn tensors(&self, file: &AdapterFile) -> Result<EditTensors> {
        let value = match self {
            Self::LowRank { down, up } => {
                let down = Some(file.read(*down)?);
                return Ok(EditTensors { down, up: Some(file.read(*up)?), ..EditTensors::default() });
            }
            Self::Value(index) => file.read(*index)?,
            Self::Hadamard { w1, w2 } => hadamard(&read_all(file, w1)?, &read_all(file, w2)?)?,
            Self::Kronecker { w1, w2 } => kronecker(&read_all(file, w1)?, &read_all(file, w2)?)?,
        };
        Ok(EditTensors { value: Some(value), ..EditTensors::default() })
    }
}

impl EditRecipe {
    /// Computes the tensors of the edit.
    pub fn tensors(&self, file: &AdapterFile) -> Result<EditTensors> {
        let magnitude = self.magnitude.map(|index| file.read(index)).transpose()?;
        Ok(EditTensors { magnitude, ..self.form.tensors(file)? })
    }
}

fn read_all(file: &AdapterFile, indexes: &[usize]) -> Result<Vec<OwnedTensor>> {
    indexes.iter().map(|index| file.read(*index)).collect()
}

/// Rows, and elements of a row. A scalar has one row.
pub fn matrix_shape(shape: &[usize]) -> [usize; 2] {
    [shape.first().copied().unwrap_or(1), shape.iter().skip(1).product()]
}
