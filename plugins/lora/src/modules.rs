//! [`FileEdits`]: groups the tensors of a file by module, and turns each module into edits.

use crate::names::{TensorName, TensorRole};
use crate::recipes::{EditForm, EditRecipe, matrix_shape};
use crate::settings::PeftSettings;
use candle_core::DType;
use clearform_plugin_abi::sdk::{AdapterFile, EditOperation, FileTensor, ParameterEdit, Result};
use clearform_plugin_abi::tensor::OwnedTensor;
use std::collections::BTreeMap;

/// The edits of a file, how to compute the tensors of each, and the tensors that are skipped.
#[derive(Default)]
pub struct FileEdits {
    pub edits: Vec<ParameterEdit>,
    pub recipes: Vec<EditRecipe>,
    /// Reasons by index.
    pub skipped: BTreeMap<usize, &'static str>,
}

/// The tensors of one module, by role.
struct LoraModule<'a> {
    component: &'static str,
    name: String,
    first_rows: bool,
    tensors: BTreeMap<TensorRole, usize>,
    infos: &'a [FileTensor],
}

/// Edits that use one tensor as it is: its role, the parameter of the module, and what the edit does.
const SINGLE_TENSOR_EDITS: [(TensorRole, &str, EditOperation); 4] = [
    (TensorRole::Diff, "weight", EditOperation::Delta { scale: 1.0 }),
    (TensorRole::DiffBias, "bias", EditOperation::Delta { scale: 1.0 }),
    (TensorRole::SetWeight, "weight", EditOperation::Replace),
    (TensorRole::Parameter, "", EditOperation::Replace),
];

const SHAPE_IS_REDUNDANT: &str = "its factors have the same information";

impl FileEdits {
    /// Reads names, alphas and settings of `file`.
    ///
    /// # Errors
    /// A module is incomplete, a tensor exists twice, or a form is not supported.
    pub fn read(file: &AdapterFile) -> Result<Self> {
        let infos = file.tensors();
        let settings = PeftSettings::read(file)?;
        let mut edits = Self::default();
        for module in modules(&infos)? {
            edits.add(&module, file, &settings)?;
        }
        Ok(edits)
    }

    fn add(&mut self, module: &LoraModule, file: &AdapterFile, settings: &PeftSettings) -> Result<()> {
        module.check_supported()?;
        self.skipped.extend(module.get(TensorRole::Shape).map(|index| (index, SHAPE_IS_REDUNDANT)));
        if let Some((form, rank)) = module.product()? {
            let scale = module.scale(rank, file, settings)?;
            self.add_product(module, form, scale);
        }
        for (role, parameter, operation) in SINGLE_TENSOR_EDITS {
            if let Some(index) = module.get(role) {
                self.push(module.edit(parameter, operation, &[index]), EditForm::Value(index), None);
            }
        }
        Ok(())
    }

    /// Adds the edit of the weight, and that of the bias if there is one.
    fn add_product(&mut self, module: &LoraModule, form: EditForm, scale: f64) {
        let operation = match form {
            EditForm::LowRank { .. } => EditOperation::LowRank { scale },
            _ => EditOperation::Delta { scale },
        };
        let sources: Vec<usize> = form.indexes().into_iter().chain(module.get(TensorRole::Alpha)).collect();
        let shape = form.shape(module.infos);
        let edit = ParameterEdit { shape, ..module.edit("weight", operation, &sources) };
        self.push(edit, form, module.get(TensorRole::Magnitude));
        if let Some(bias) = module.get(TensorRole::UpBias) {
            self.push(module.edit("bias", EditOperation::Delta { scale }, &[bias]), EditForm::Value(bias), None);
        }
    }

    fn push(&mut self, mut edit: ParameterEdit, form: EditForm, magnitude: Option<usize>) {
        edit.decomposed = magnitude.is_some();
        edit.sources.extend(magnitude);
        self.edits.push(edit);
        self.recipes.push(EditRecipe { form, magnitude });
    }
}

/// Groups tensors by module. Tensors whose names are in no known format are left out: the host reports them.
fn modules(infos: &[FileTensor]) -> Result<Vec<LoraModule<'_>>> {
    let mut grouped: BTreeMap<(&'static str, String, bool), BTreeMap<TensorRole, usize>> = BTreeMap::new();
    for (index, info) in infos.iter().enumerate() {
        let Some(TensorName { component, module, role, first_rows }) = TensorName::parse(&info.name) else {
            continue;
        };
        let tensors = grouped.entry((component, module, first_rows)).or_default();
        if let Some(other) = tensors.insert(role, index) {
            return Err(format!("{:?} and {:?} are the same tensor of one module", infos[other].name, info.name));
        }
    }
    let module = |((component, name, first_rows), tensors)| LoraModule { component, name, first_rows, tensors, infos };
    Ok(grouped.into_iter().map(module).collect())
}

impl LoraModule<'_> {
    fn get(&self, role: TensorRole) -> Option<usize> {
        self.tensors.get(&role).copied()
    }

    fn check_supported(&self) -> Result<()> {
        match self.get(TensorRole::Tucker) {
            None => Ok(()),
            Some(index) => Err(format!(
                "{:?}: Tucker-decomposed convolutions are not supported: no transformer that clearform knows has them",
                self.infos[index].name
            )),
        }
    }

    /// The product that changes the weight, with its rank if it has one; none if the module has no product.
    fn product(&self) -> Result<Option<(EditForm, Option<usize>)>> {
        if let Some((down, up)) = self.pair(TensorRole::Down, TensorRole::Up)? {
            return Ok(Some((EditForm::LowRank { down, up }, self.rows(down))));
        }
        match self.hadamard()? {
            Some(hadamard) => Ok(Some(hadamard)),
            None => self.kronecker(),
        }
    }

    fn hadamard(&self) -> Result<Option<(EditForm, Option<usize>)>> {
        let w1 = self.pair(TensorRole::HadaW1A, TensorRole::HadaW1B)?;
        let w2 = self.pair(TensorRole::HadaW2A, TensorRole::HadaW2B)?;
        match (w1, w2) {
            (Some((a1, b1)), Some((a2, b2))) => {
                Ok(Some((EditForm::Hadamard { w1: [a1, b1], w2: [a2, b2] }, self.rows(b1))))
            }
            (None, None) => Ok(None),
            _ => Err(format!("module {:?} has only one of the two products of a LoHa", self.name)),
        }
    }

    fn kronecker(&self) -> Result<Option<(EditForm, Option<usize>)>> {
        let w1 = self.kronecker_factor(TensorRole::LokrW1, TensorRole::LokrW1A, TensorRole::LokrW1B)?;
        let w2 = self.kronecker_factor(TensorRole::LokrW2, TensorRole::LokrW2A, TensorRole::LokrW2B)?;
        match (w1, w2) {
            (Some(w1), Some(w2)) => {
                // A factor has a rank if it is itself a product. If both are whole there is none, and alpha has no
                // meaning.
                let rank = [&w2, &w1].into_iter().find_map(|factor| factor.get(1)).and_then(|b| self.rows(*b));
                Ok(Some((EditForm::Kronecker { w1, w2 }, rank)))
            }
            (None, None) => Ok(None),
            _ => Err(format!("module {:?} has only one of the two factors of a LoKr", self.name)),
        }
    }

    fn kronecker_factor(&self, whole: TensorRole, a: TensorRole, b: TensorRole) -> Result<Option<Vec<usize>>> {
        Ok(match self.get(whole) {
            Some(index) => Some(vec![index]),
            None => self.pair(a, b)?.map(|(a, b)| vec![a, b]),
        })
    }

    /// Two factors that belong together.
    fn pair(&self, a: TensorRole, b: TensorRole) -> Result<Option<(usize, usize)>> {
        match (self.get(a), self.get(b)) {
            (Some(a), Some(b)) => Ok(Some((a, b))),
            (None, None) => Ok(None),
            (Some(single), None) | (None, Some(single)) => {
                Err(format!("{:?}: the factor that belongs to it is missing from the file", self.infos[single].name))
            }
        }
    }

    fn rows(&self, index: usize) -> Option<usize> {
        self.infos[index].shape.first().copied()
    }

    /// The scale from peft's settings, or else alpha / rank with the alpha in the file, or else 1.
    fn scale(&self, rank: Option<usize>, file: &AdapterFile, settings: &PeftSettings) -> Result<f64> {
        let Some(rank) = rank else { return Ok(1.0) };
        if rank == 0 {
            return Err(format!("module {:?}: its factors have rank 0", self.name));
        }
        if let Some(scale) = settings.scale(self.component, &self.name, rank) {
            return Ok(scale);
        }
        match self.get(TensorRole::Alpha) {
            Some(index) => Ok(scalar(&file.read(index)?, &self.infos[index].name)? / rank as f64),
            None => Ok(1.0),
        }
    }

    /// An edit of a parameter of the module, with the shape of its first tensor.
    fn edit(&self, parameter: &str, operation: EditOperation, sources: &[usize]) -> ParameterEdit {
        let name = if parameter.is_empty() { self.name.clone() } else { format!("{}.{parameter}", self.name) };
        ParameterEdit {
            operation,
            decomposed: false,
            component: self.component.to_owned(),
            parameter: name,
            first_row: self.first_rows.then_some(0),
            shape: matrix_shape(&self.infos[sources[0]].shape),
            sources: sources.to_vec(),
        }
    }
}

/// The value of a tensor with one element.
fn scalar(tensor: &OwnedTensor, name: &str) -> Result<f64> {
    let values = || tensor.view().to_candle()?.to_dtype(DType::F64)?.flatten_all()?.to_vec1::<f64>();
    match values().map_err(|error| format!("{name:?}: {error}"))?[..] {
        [value] if value.is_finite() => Ok(value),
        _ => Err(format!("{name:?}: expected one finite value")),
    }
}
