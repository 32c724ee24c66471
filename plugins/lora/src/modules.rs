//! [`LoraModules`]: the tensors of each module together, and the edits that they are.

use crate::names::{TensorName, TensorRole};
use crate::products::{hadamard, kronecker};
use crate::settings::PeftSettings;
use candle_core::DType;
use clearform_plugin_abi::sdk::{AdapterFile, EditOperation, FileTensor, GivenTensors, ParameterEdit, Result};
use clearform_plugin_abi::tensor::OwnedTensor;
use std::collections::BTreeMap;

/// Every edit of a file, with how to make its tensors, and the tensors that are no edit.
#[derive(Default)]
pub struct LoraModules {
    pub edits: Vec<ParameterEdit>,
    pub recipes: Vec<EditRecipe>,
    pub skipped: BTreeMap<usize, &'static str>,
}

/// How the tensors of an edit are made of the file's, by their indexes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EditRecipe {
    form: EditForm,
    magnitude: Option<usize>,
}

/// The form of an edit.
#[derive(Debug, Clone, PartialEq, Eq)]
enum EditForm {
    LowRank { down: usize, up: usize },
    Value(usize),
    Hadamard { w1: [usize; 2], w2: [usize; 2] },
    Kronecker { w1: Vec<usize>, w2: Vec<usize> },
}

/// The tensors of one module, by role.
struct LoraModule<'a> {
    component: &'static str,
    name: &'a str,
    first_rows: bool,
    tensors: BTreeMap<TensorRole, usize>,
    infos: &'a [FileTensor],
}

const SHAPE_IS_TOLD: &str = "its factors tell the same";

impl LoraModules {
    /// Reads names, alphas and settings of `file`.
    pub fn read(file: &AdapterFile) -> Result<Self> {
        let (infos, settings) = (file.tensors(), PeftSettings::read(file)?);
        let mut named: BTreeMap<(&'static str, String, bool), BTreeMap<TensorRole, usize>> = BTreeMap::new();
        for (index, info) in infos.iter().enumerate() {
            let Some(TensorName { component, module, role, first_rows }) = TensorName::read(&info.name) else {
                continue;
            };
            let tensors = named.entry((component, module, first_rows)).or_default();
            if let Some(other) = tensors.insert(role, index) {
                return Err(format!("{:?} and {:?} say the same of one module", infos[other].name, info.name));
            }
        }
        let mut modules = Self::default();
        for ((component, name, first_rows), tensors) in &named {
            let module =
                LoraModule { component, name, first_rows: *first_rows, tensors: tensors.clone(), infos: &infos };
            modules.add(&module, file, &settings)?;
        }
        Ok(modules)
    }

    fn add(&mut self, module: &LoraModule, file: &AdapterFile, settings: &PeftSettings) -> Result<()> {
        if let Some(index) = module.get(TensorRole::Tucker) {
            let name = &module.infos[index].name;
            return Err(format!(
                "{name:?} is a factor of a convolution in Tucker's form, which no transformer here has"
            ));
        }
        if let Some(index) = module.get(TensorRole::Shape) {
            self.skipped.insert(index, SHAPE_IS_TOLD);
        }
        if let Some((form, rank)) = module.product()? {
            let scale = module.scale(rank, file, settings)?;
            let kind = match form {
                EditForm::LowRank { .. } => EditOperation::LowRank { scale },
                _ => EditOperation::Delta { scale },
            };
            let magnitude = module.get(TensorRole::Magnitude);
            let sources: Vec<usize> = form.indexes().into_iter().chain(module.get(TensorRole::Alpha)).collect();
            let edit = ParameterEdit { extents: form.extents(module.infos), ..module.edit("weight", kind, &sources) };
            self.put(edit, form, magnitude);
            if let Some(bias) = module.get(TensorRole::UpBias) {
                self.put(module.edit("bias", EditOperation::Delta { scale }, &[bias]), EditForm::Value(bias), None);
            }
        }
        let plain = [
            (TensorRole::Diff, "weight", EditOperation::Delta { scale: 1.0 }),
            (TensorRole::DiffBias, "bias", EditOperation::Delta { scale: 1.0 }),
            (TensorRole::SetWeight, "weight", EditOperation::Replace),
            (TensorRole::Parameter, "", EditOperation::Replace),
        ];
        for (role, parameter, kind) in plain {
            if let Some(index) = module.get(role) {
                self.put(module.edit(parameter, kind, &[index]), EditForm::Value(index), None);
            }
        }
        Ok(())
    }

    fn put(&mut self, mut edit: ParameterEdit, form: EditForm, magnitude: Option<usize>) {
        edit.decomposed = magnitude.is_some();
        edit.sources.extend(magnitude);
        self.edits.push(edit);
        self.recipes.push(EditRecipe { form, magnitude });
    }
}

impl LoraModule<'_> {
    fn get(&self, role: TensorRole) -> Option<usize> {
        self.tensors.get(&role).copied()
    }

    /// The product that edits the weight, and its rank where one is defined; none if there is no product.
    fn product(&self) -> Result<Option<(EditForm, Option<usize>)>> {
        let rows = |index: usize| self.infos[index].shape.first().copied();
        if let Some((down, up)) = self.pair(TensorRole::Down, TensorRole::Up)? {
            return Ok(Some((EditForm::LowRank { down, up }, rows(down))));
        }
        match (
            self.pair(TensorRole::HadaW1A, TensorRole::HadaW1B)?,
            self.pair(TensorRole::HadaW2A, TensorRole::HadaW2B)?,
        ) {
            (Some((a1, b1)), Some((a2, b2))) => {
                return Ok(Some((EditForm::Hadamard { w1: [a1, b1], w2: [a2, b2] }, rows(b1))));
            }
            (None, None) => {}
            _ => return Err(format!("module {:?} has only one of the two products of a LoHa", self.name)),
        }
        let w1 = self.kronecker_factor(TensorRole::LokrW1, TensorRole::LokrW1A, TensorRole::LokrW1B)?;
        let w2 = self.kronecker_factor(TensorRole::LokrW2, TensorRole::LokrW2A, TensorRole::LokrW2B)?;
        match (w1, w2) {
            (Some(w1), Some(w2)) => {
                // Both whole: there is no rank, and alpha means nothing.
                let rank = [&w2, &w1].into_iter().find_map(|factor| factor.get(1)).and_then(|b| rows(*b));
                Ok(Some((EditForm::Kronecker { w1, w2 }, rank)))
            }
            (None, None) => Ok(None),
            _ => Err(format!("module {:?} has only one of the two factors of a LoKr", self.name)),
        }
    }

    fn pair(&self, a: TensorRole, b: TensorRole) -> Result<Option<(usize, usize)>> {
        match (self.get(a), self.get(b)) {
            (Some(a), Some(b)) => Ok(Some((a, b))),
            (None, None) => Ok(None),
            (Some(one), None) | (None, Some(one)) => {
                Err(format!("{:?} has no partner: the file is not whole", self.infos[one].name))
            }
        }
    }

    fn kronecker_factor(&self, whole: TensorRole, a: TensorRole, b: TensorRole) -> Result<Option<Vec<usize>>> {
        Ok(match self.get(whole) {
            Some(index) => Some(vec![index]),
            None => self.pair(a, b)?.map(|(a, b)| vec![a, b]),
        })
    }

    /// peft's settings count first, then the alpha in the file; without either it is 1.
    fn scale(&self, rank: Option<usize>, file: &AdapterFile, settings: &PeftSettings) -> Result<f64> {
        let Some(rank) = rank else { return Ok(1.0) };
        if rank == 0 {
            return Err(format!("the factors of module {:?} have no rank", self.name));
        }
        if let Some(scale) = settings.scale(self.component, self.name, rank) {
            return Ok(scale);
        }
        match self.get(TensorRole::Alpha) {
            Some(index) => Ok(number(&file.read(index)?, &self.infos[index].name)? / rank as f64),
            None => Ok(1.0),
        }
    }

    /// An edit of a parameter of the module: of the first tensor's extents.
    fn edit(&self, parameter: &str, kind: EditOperation, sources: &[usize]) -> ParameterEdit {
        let name = if parameter.is_empty() { self.name.to_owned() } else { format!("{}.{parameter}", self.name) };
        ParameterEdit {
            kind,
            decomposed: false,
            component: self.component.to_owned(),
            parameter: name,
            first_row: self.first_rows.then_some(0),
            extents: extents(&self.infos[sources[0]].shape),
            sources: sources.to_vec(),
        }
    }
}

impl EditForm {
    fn indexes(&self) -> Vec<usize> {
        match self {
            Self::LowRank { down, up } => vec![*down, *up],
            Self::Value(index) => vec![*index],
            Self::Hadamard { w1, w2 } => [*w1, *w2].concat(),
            Self::Kronecker { w1, w2 } => [w1.as_slice(), w2].concat(),
        }
    }

    fn extents(&self, infos: &[FileTensor]) -> [usize; 2] {
        let of = |index: &usize| extents(&infos[*index].shape);
        let product = |factors: &[usize]| match factors {
            [whole] => of(whole),
            [a, b, ..] => [of(a)[0], of(b)[1]],
            [] => [0, 0],
        };
        match self {
            Self::LowRank { down, up } => [of(up)[0], of(down)[1]],
            Self::Value(index) => of(index),
            Self::Hadamard { w1, .. } => product(w1),
            Self::Kronecker { w1, w2 } => {
                let ([a, b], [c, d]) = (product(w1), product(w2));
                [a.saturating_mul(c), b.saturating_mul(d)]
            }
        }
    }
}

impl EditRecipe {
    /// The tensors of the edit.
    pub fn tensors(&self, file: &AdapterFile) -> Result<GivenTensors> {
        let magnitude = self.magnitude.map(|index| file.read(index)).transpose()?;
        let all = |indexes: &[usize]| indexes.iter().map(|index| file.read(*index)).collect::<Result<Vec<_>>>();
        Ok(match &self.form {
            EditForm::LowRank { down, up } => GivenTensors {
                down: Some(file.read(*down)?),
                up: Some(file.read(*up)?),
                magnitude,
                ..GivenTensors::default()
            },
            EditForm::Value(index) => {
                GivenTensors { value: Some(file.read(*index)?), magnitude, ..GivenTensors::default() }
            }
            EditForm::Hadamard { w1, w2 } => {
                let ([a1, b1], [a2, b2]) = (pair(file, w1)?, pair(file, w2)?);
                let value = hadamard([&a1, &b1], [&a2, &b2])?;
                GivenTensors { value: Some(value), magnitude, ..GivenTensors::default() }
            }
            EditForm::Kronecker { w1, w2 } => {
                let (w1, w2) = (all(w1)?, all(w2)?);
                let value = kronecker(&w1.iter().collect::<Vec<_>>(), &w2.iter().collect::<Vec<_>>())?;
                GivenTensors { value: Some(value), magnitude, ..GivenTensors::default() }
            }
        })
    }
}

fn pair(file: &AdapterFile, [a, b]: &[usize; 2]) -> Result<[OwnedTensor; 2]> {
    Ok([file.read(*a)?, file.read(*b)?])
}

/// Rows, and elements of a row; a scalar is one row.
fn extents(shape: &[usize]) -> [usize; 2] {
    [shape.first().copied().unwrap_or(1), shape.iter().skip(1).product()]
}

/// The one number of a tensor.
fn number(tensor: &OwnedTensor, name: &str) -> Result<f64> {
    let read = || tensor.view().to_candle()?.to_dtype(DType::F64)?.flatten_all()?.to_vec1::<f64>();
    match read().map_err(|error| format!("{name:?}: {error}"))?[..] {
        [number] if number.is_finite() => Ok(number),
        _ => Err(format!("{name:?}: expected one finite number")),
    }
}
