//! [`FileEdits`]: groups the tensors of a file by module, and turns each module into edits.

use crate::names::{TensorName, TensorRole};
use crate::peft_config::RankedModule;
use crate::recipes::{EditForm, EditRecipe, FactoredMatrix, StoredMagnitude, check_float, matrix_shape};
use crate::settings::{PeftSettings, Stated};
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
    /// What the user should know about the settings of the file.
    pub notes: Vec<String>,
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

/// Relative difference of scales that are the same: alphas are often stored in half precision.
const SAME_SCALE: f64 = 1e-2;

const SHAPE_IS_REDUNDANT: &str = "its factors have the same information";

impl FileEdits {
    /// Reads names, alphas and settings of `file`.
    ///
    /// # Errors
    /// A module is incomplete, a tensor exists twice, or a form is not supported.
    pub fn read(file: &AdapterFile) -> Result<Self> {
        let infos = file.tensors();
        let modules = modules(&infos)?;
        let settings = PeftSettings::read(file)?;
        let ranked: Vec<RankedModule> = modules.iter().map(LoraModule::ranked).collect();
        let mut edits = Self { notes: settings.notes(&ranked)?, ..Self::default() };
        for module in &modules {
            edits.add(module, file, &settings).map_err(|reason| format!("module {:?}: {reason}", module.name))?;
        }
        Ok(edits)
    }

    fn add(&mut self, module: &LoraModule, file: &AdapterFile, settings: &PeftSettings) -> Result<()> {
        self.skipped.extend(module.get(TensorRole::Shape).map(|index| (index, SHAPE_IS_REDUNDANT)));
        if let Some(form) = module.product()? {
            form.check(module.infos)?;
            module.check_dora(&form, settings)?;
            let scale = module.scale(form.rank(module.infos), file, settings)?;
            self.add_product(module, form, scale)?;
        }
        for (role, parameter, operation) in SINGLE_TENSOR_EDITS {
            if let Some(index) = module.get(role) {
                self.push_value(module.edit(parameter, operation, &[index]), &module.infos[index], index)?;
            }
        }
        Ok(())
    }

    /// Adds the edit of the weight, and that of the bias if there is one.
    fn add_product(&mut self, module: &LoraModule, form: EditForm, scale: f64) -> Result<()> {
        let operation = match form {
            EditForm::LowRank { .. } => EditOperation::LowRank { scale },
            _ => EditOperation::Delta { scale },
        };
        let sources: Vec<usize> = form.indexes().into_iter().chain(module.get(TensorRole::Alpha)).collect();
        let shape = form.shape(module.infos);
        let edit = ParameterEdit { shape, ..module.edit("weight", operation, &sources) };
        self.push(edit, form, module.magnitude());
        if let Some(bias) = module.get(TensorRole::UpBias) {
            self.push_value(module.edit("bias", EditOperation::Delta { scale }, &[bias]), &module.infos[bias], bias)?;
        }
        Ok(())
    }

    /// Adds an edit that uses the tensor at `index` as it is.
    fn push_value(&mut self, edit: ParameterEdit, info: &FileTensor, index: usize) -> Result<()> {
        check_float(info)?;
        self.push(edit, EditForm::Value(FactoredMatrix::Whole(index)), None);
        Ok(())
    }

    fn push(&mut self, mut edit: ParameterEdit, form: EditForm, magnitude: Option<StoredMagnitude>) {
        edit.decomposed = magnitude.is_some();
        edit.sources.extend(magnitude.map(|magnitude| magnitude.index));
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

    fn magnitude(&self) -> Option<StoredMagnitude> {
        let index = self.get(TensorRole::Magnitude)?;
        Some(StoredMagnitude::new(index, &self.infos[index]))
    }

    fn ranked(&self) -> RankedModule<'_> {
        let form = self.product().ok().flatten();
        let rank = form.and_then(|form| form.rank(self.infos));
        RankedModule { component: self.component, name: &self.name, rank }
    }

    /// The product that changes the weight; none if the module has no product.
    fn product(&self) -> Result<Option<EditForm>> {
        if let Some((down, up)) = self.pair(TensorRole::Down, TensorRole::Up)? {
            return Ok(Some(match self.get(TensorRole::Mid) {
                Some(core) => EditForm::Value(FactoredMatrix::Core { core, up, down }),
                None => EditForm::LowRank { down, up },
            }));
        }
        let hada = [
            self.product_factor(TensorRole::HadaW1A, TensorRole::HadaW1B, Some(TensorRole::HadaT1))?,
            self.product_factor(TensorRole::HadaW2A, TensorRole::HadaW2B, Some(TensorRole::HadaT2))?,
        ];
        let lokr = [
            self.factor(TensorRole::LokrW1, TensorRole::LokrW1A, TensorRole::LokrW1B, None)?,
            self.factor(TensorRole::LokrW2, TensorRole::LokrW2A, TensorRole::LokrW2B, Some(TensorRole::LokrT2))?,
        ];
        match (hada, lokr) {
            ([Some(w1), Some(w2)], _) => Ok(Some(EditForm::Hadamard([w1, w2]))),
            ([None, None], [Some(w1), Some(w2)]) => Ok(Some(EditForm::Kronecker([w1, w2]))),
            ([None, None], [None, None]) => Ok(None),
            ([None, None], _) => Err("it has only one of the two factors of a LoKr".to_owned()),
            _ => Err("it has only one of the two products of a LoHa".to_owned()),
        }
    }

    /// A factor that is one tensor, or a product.
    fn factor(
        &self,
        whole: TensorRole,
        a: TensorRole,
        b: TensorRole,
        core: Option<TensorRole>,
    ) -> Result<Option<FactoredMatrix>> {
        match self.get(whole) {
            Some(index) => Ok(Some(FactoredMatrix::Whole(index))),
            None => self.product_factor(a, b, core),
        }
    }

    fn product_factor(&self, a: TensorRole, b: TensorRole, core: Option<TensorRole>) -> Result<Option<FactoredMatrix>> {
        let core = core.and_then(|core| self.get(core));
        Ok(self.pair(a, b)?.map(|(a, b)| match core {
            Some(core) => FactoredMatrix::Tucker { core, outputs: a, inputs: b },
            None => FactoredMatrix::Product { a, b },
        }))
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

    /// The magnitude must fit the weight, and the settings must not contradict that there is one.
    fn check_dora(&self, form: &EditForm, settings: &PeftSettings) -> Result<()> {
        let magnitude = self.magnitude();
        for Stated { value, origin } in settings.use_dora(self.component) {
            match (value, magnitude) {
                (true, None) => {
                    return Err(format!("{origin}: use_dora is true, but the file has no magnitude for it"));
                }
                (false, Some(magnitude)) => {
                    let name = &self.infos[magnitude.index].name;
                    return Err(format!("{origin}: use_dora is false, but the file has the magnitude {name:?}"));
                }
                _ => {}
            }
        }
        let shape = form.shape(self.infos);
        magnitude.map_or(Ok(()), |magnitude| magnitude.check(&self.infos[magnitude.index], shape))
    }

    /// The scale from peft's settings or from the file's alpha, 1 without either. All that state one must agree.
    fn scale(&self, rank: Option<usize>, file: &AdapterFile, settings: &PeftSettings) -> Result<f64> {
        if rank == Some(0) {
            return Err("its factors have rank 0".to_owned());
        }
        let mut stated = settings.scales(self.component, &self.name, rank)?;
        if let (Some(index), Some(rank)) = (self.get(TensorRole::Alpha), rank) {
            let name = &self.infos[index].name;
            let value = scalar(&file.read(index)?, name)? / rank as f64;
            stated.push(Stated { value, origin: format!("{name:?}") });
        }
        let Some(first) = stated.first() else { return Ok(1.0) };
        let differs = |other: &&Stated<f64>| (other.value - first.value).abs() > SAME_SCALE * first.value.abs();
        match stated.iter().find(differs) {
            None => Ok(first.value),
            Some(other) => Err(format!(
                "{} gives the scale {}, and {} gives {}: remove the wrong one",
                first.origin, first.value, other.origin, other.value
            )),
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
