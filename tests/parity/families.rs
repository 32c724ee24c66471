//! Every family except FLUX, compared with its reference class: stages, the whole forward and gradients, with full and
//! CLEAR attention. Weights are seeded by their names in the original files; fixtures/<family>/export.py describes the
//! fixtures.
#![allow(clippy::unwrap_used)]

use candle_core::Tensor;
use clearform_attention::AttentionPlan;
use clearform_distill::{
    Activations, Batch, LossSettings, Optimizer, OptimizerState, PairSpec, TeacherStudent, backward,
};
use clearform_layout::{CanonicalSource, Hints, Identified, Manifests, Sidecar, detect_source};
use clearform_models::{Architecture, DenoiserInput, FamilyRegistry, HiddenState};
use clearform_testkit::{assert_close, fixture, relative_error, seeded_file};
use clearform_weights::{InMemoryTensors, ProductPrecision, TensorSource};
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

/// Largest relative error of a stage in f32.
const BOUND: f64 = 2e-5;
/// Gradients add up the rounding of the forward and the backward pass.
const GRADIENT_BOUND: f64 = 1e-4;
const ATTENTIONS: [(&str, &str); 2] = [("full", "full"), ("r3", "clear:r=3")];

/// A model with its fixture.
struct Model {
    architecture: Box<dyn Architecture>,
    identified: Identified,
    canonical: CanonicalSource<InMemoryTensors>,
    cases: BTreeMap<String, Tensor>,
}

impl Model {
    fn open(family: &str, name: &str) -> Self {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures").join(family).join(name);
        let source: InMemoryTensors = seeded_file(folder.join("shapes.json"), "").into_iter().collect();
        let config: Value = serde_json::from_slice(&std::fs::read(folder.join("config.json")).unwrap()).unwrap();
        let config = if family == "minrf" || name != "original" { config } else { hint_config(&config) };
        let sidecar = Sidecar { config: Some(&config), metadata: &BTreeMap::new() };
        let hints = Hints { family: Some(family.to_owned()), ..Hints::default() };
        let identified = detect_source(&source, sidecar, &Manifests::embedded().unwrap(), &hints).unwrap();
        let canonical = identified.canonical(source).require_complete().unwrap();
        let architecture = FamilyRegistry::default().get(family).unwrap().parse(&identified.config).unwrap();
        Self { architecture, identified, canonical, cases: fixture(folder.join("cases.safetensors")) }
    }

    /// The tensors of the fixture whose names begin with `prefix`, without the prefix.
    fn with_prefix(&self, prefix: &str) -> BTreeMap<String, Tensor> {
        let stripped = self.cases.iter().filter_map(|(name, tensor)| Some((name.strip_prefix(prefix)?, tensor)));
        stripped.map(|(name, tensor)| (name.to_owned(), tensor.clone())).collect()
    }

    fn input(&self, prefix: &str) -> DenoiserInput {
        self.architecture.parse_input(self.with_prefix(&format!("{prefix}/input/"))).unwrap()
    }

    fn grids(&self) -> BTreeSet<&str> {
        let grids = self.cases.keys().filter_map(|name| name.split_once('/')).map(|(grid, _)| grid);
        grids.filter(|grid| *grid != "gradient").collect()
    }

    fn weights(&self) -> InMemoryTensors {
        let names = self.canonical.tensors().into_iter().map(|info| info.name);
        names.map(|name| (name.clone(), self.canonical.tensor(&name).unwrap())).collect()
    }

    /// Compares every stage of the fixture, and the sample. Returns the error of the sample.
    fn check(&self, grid: &str, (name, plan): (&str, &str)) -> f64 {
        let wanted = self.with_prefix(&format!("{grid}/{name}/"));
        let plan: AttentionPlan = plan.parse().unwrap();
        let denoiser = self.architecture.build(&self.canonical, &plan).unwrap();
        let mut state = denoiser.embed(&self.input(grid)).unwrap();
        let what = format!("{} {grid} {name}", self.identified.family);
        let mut compared = check_state(&what, &state, &wanted, "embed");
        for index in 0..denoiser.block_count() {
            state = denoiser.block(index, state).unwrap();
            compared += check_state(&what, &state, &wanted, &index.to_string());
        }
        assert_eq!(compared, wanted.len() - 1, "{what}: a stage of the fixture was not compared: {:?}", wanted.keys());
        let sample = denoiser.head(&state).unwrap();
        assert_close(&format!("{what} sample"), &sample, &wanted["sample"], BOUND);
        relative_error(&sample, &wanted["sample"]).unwrap()
    }

    /// Teacher and student for the gradients of the fixture, and their batch.
    fn teacher_student(&self) -> (TeacherStudent, Batch) {
        let weights = self.weights();
        let plan: AttentionPlan = "clear:r=3".parse().unwrap();
        let products = ProductPrecision::Full;
        let recipe = PairSpec { architecture: self.architecture.as_ref(), plan: &plan, products };
        let batch = Batch { input: self.input("gradient"), target: self.cases["gradient/target"].clone() };
        (TeacherStudent::build(recipe, &weights, &weights).unwrap(), batch)
    }

    /// Ten steps on one batch reduce the loss to less than 70%.
    fn check_learning(&self) {
        let (pair, batch) = self.teacher_student();
        let settings = LossSettings { denoising: 0.0, ..LossSettings::default() };
        let mut optimizer = OptimizerState::default();
        let mut losses = Vec::new();
        for _ in 0..10 {
            let (loss, gradients) = backward(&pair, &batch, &settings, Activations::Keep).unwrap();
            optimizer.step(Optimizer::default(), 2e-3, pair.masters(), &gradients).unwrap();
            losses.push(loss.total);
        }
        assert!(losses[9] < 0.7 * losses[0], "{}: losses {losses:?}", self.identified.family);
    }

    fn check_gradients(&self) {
        let (pair, batch) = self.teacher_student();
        let loss = LossSettings { denoising: 1.0, prediction: 0.5, attention: 0.0, ..LossSettings::default() };
        let (losses, gradients) = backward(&pair, &batch, &loss, Activations::Recompute).unwrap();
        let wanted = self.cases["gradient/losses"].to_vec1::<f32>().unwrap();
        for (got, wanted) in [losses.denoising, losses.prediction].into_iter().zip(wanted) {
            assert!(
                (got as f32 - wanted).abs() <= 1e-4 * wanted,
                "{}: loss {got}, wanted {wanted}",
                self.identified.family
            );
        }
        let gradients: InMemoryTensors = gradients.into_iter().collect();
        let foreign = self.foreign_gradients(&gradients);
        let in_fixture = foreign.iter().filter(|(name, _)| self.cases.contains_key(&format!("gradient/{name}")));
        let mut checked = 0;
        for (name, got) in in_fixture {
            let what = format!("{}: gradient of {name}", self.identified.family);
            let wanted = &self.cases[&format!("gradient/{name}")];
            // A bias that all keys share cancels in the softmax unless keys are normalised: its gradient is zero.
            match largest(wanted) < 1e-6 {
                true => assert!(largest(got) < 1e-6, "{what} should be zero"),
                false => assert_close(&what, got, wanted, GRADIENT_BOUND),
            }
            checked += 1;
        }
        let expected = self.cases.keys().filter(|name| is_gradient(name)).count();
        assert_eq!(checked, expected, "{}: not every gradient was compared", self.identified.family);
        assert!(expected >= 4, "{}: only {expected} gradients", self.identified.family);
    }

    /// Gradients under the names of the layout, in which q, k and v may be fused.
    fn foreign_gradients(&self, gradients: &InMemoryTensors) -> BTreeMap<String, Tensor> {
        let foreign = self.identified.to_layout(&self.identified.layout, gradients).unwrap();
        let names = foreign.tensors().into_iter().map(|info| info.name);
        names.map(|name| (name.clone(), foreign.tensor(&name).unwrap())).collect()
    }
}

/// The setting that a user must pass for a file of facebook's: the size of a head, which the tensors do not show.
fn hint_config(config: &Value) -> Value {
    let size = |key: &str| config[key].as_u64().unwrap();
    json!({"attention_head_dim": size("hidden_size") / size("num_heads")})
}

fn largest(tensor: &Tensor) -> f32 {
    tensor.abs().unwrap().flatten_all().unwrap().max(0).unwrap().to_scalar().unwrap()
}

fn is_gradient(name: &str) -> bool {
    name.strip_prefix("gradient/")
        .is_some_and(|rest| !rest.starts_with("input/") && rest != "target" && rest != "losses")
}

/// Compares the streams of a state with those of `stage` in the fixture. Returns how many there are.
fn check_state(what: &str, state: &HiddenState, wanted: &BTreeMap<String, Tensor>, stage: &str) -> usize {
    let raster = state.context.geometry.to_raster(&state.image).unwrap();
    let streams = [("image", Some(&raster)), ("text", state.text.as_ref())];
    let mut compared = 0;
    for (name, got) in streams {
        let is_stage = |key: &&String| key.strip_suffix(&format!("{stage}/{name}")).is_some_and(is_prefix);
        if let Some(key) = wanted.keys().find(is_stage) {
            let got = got.unwrap_or_else(|| panic!("{what} {stage}: there is no {name}"));
            assert_close(&format!("{what} {key}"), got, &wanted[key], BOUND);
            compared += 1;
        }
    }
    compared
}

/// Whether `text` can precede a stage's name: it is empty, or the name of a list of blocks.
fn is_prefix(text: &str) -> bool {
    text.is_empty() || text.ends_with('.')
}

/// Checks models of a family. `--nocapture` shows the largest error.
fn check(family: &str, models: &[&str]) {
    let mut worst = 0f64;
    for name in models {
        let model = Model::open(family, name);
        let grids = model.grids();
        assert!(grids.len() >= 2, "{family} {name}: grids {grids:?}");
        for grid in grids {
            worst = ATTENTIONS.iter().map(|attention| model.check(grid, *attention)).fold(worst, f64::max);
            let sample = |attention: &str| &model.cases[&format!("{grid}/{attention}/sample")];
            let difference = relative_error(sample("r3"), sample("full")).unwrap();
            assert!(
                difference > 1e-3,
                "{family} {name} {grid}: the window changes the sample by only {difference:.1e}"
            );
        }
    }
    eprintln!("{family}: relative error of the samples up to {worst:.1e}");
}

#[test]
fn dit_equals_diffusers_and_facebook() {
    check("dit", &["diffusers", "original"]);
}

#[test]
fn minrf_equals_the_original() {
    check("minrf", &["original"]);
}

#[test]
fn pixart_equals_diffusers() {
    check("pixart", &["alpha", "sigma"]);
}

#[test]
fn sd3_equals_diffusers() {
    check("sd3", &["medium", "medium35"]);
}

#[test]
fn sit_equals_the_original() {
    check("sit", &["original"]);
}

/// Models with gradients in their fixtures.
const MODELS_WITH_GRADIENTS: [(&str, &str); 5] =
    [("dit", "original"), ("minrf", "original"), ("pixart", "sigma"), ("sd3", "medium35"), ("sit", "original")];

#[test]
fn gradients_equal_those_of_torch() {
    MODELS_WITH_GRADIENTS.iter().for_each(|(family, model)| Model::open(family, model).check_gradients());
}

#[test]
fn every_family_learns() {
    MODELS_WITH_GRADIENTS.iter().for_each(|(family, model)| Model::open(family, model).check_learning());
}
