//! Every family but FLUX against its class: stages, whole forward and gradients, with full and CLEAR attention. Weights
//! are seeded, in the names that the model is found in; fixtures/<family>/export.py says what a fixture holds.
#![allow(clippy::unwrap_used)]

use candle_core::Tensor;
use clearform_attention::AttentionPlan;
use clearform_distill::{
    Activations, Batch, LossSettings, Optimizer, OptimizerState, PairSpec, TeacherStudent, backward,
};
use clearform_layout::{CanonicalSource, Hints, Identified, Manifests, Sidecar, detect_source};
use clearform_models::{DenoiserInput, FAMILIES, Family, HiddenState};
use clearform_testkit::{assert_close, fixture, relative_error, seeded_file};
use clearform_weights::{InMemoryTensors, TensorSource};
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

/// What issue and design allow.
const BOUND: f64 = 2e-5;
const GRADIENT_BOUND: f64 = 1e-4;
const ATTENTIONS: [(&str, &str); 2] = [("full", "full"), ("r3", "clear:r=3")];

/// A model of a fixture.
struct Model {
    family: &'static dyn Family,
    identified: Identified,
    canonical: CanonicalSource<InMemoryTensors>,
    cases: BTreeMap<String, Tensor>,
}

impl Model {
    fn open(family: &str, name: &str) -> Self {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures").join(family).join(name);
        let source: InMemoryTensors = seeded_file(folder.join("shapes.json"), "").into_iter().collect();
        let config: Value = serde_json::from_slice(&std::fs::read(folder.join("config.json")).unwrap()).unwrap();
        let config = if family == "minrf" || name != "original" { config } else { told(&config) };
        let beside = Sidecar { config: Some(&config), metadata: &BTreeMap::new() };
        let hints = Hints { family: Some(family.to_owned()), ..Hints::default() };
        let identified = detect_source(&source, beside, &Manifests::embedded().unwrap(), &hints).unwrap();
        let canonical = identified.canonical(source).complete().unwrap();
        let family = FAMILIES.iter().find(|known| known.name() == family).copied().unwrap();
        Self { family, identified, canonical, cases: fixture(folder.join("cases.safetensors")) }
    }

    /// The tensors of the fixture below `prefix`, without it.
    fn below(&self, prefix: &str) -> BTreeMap<String, Tensor> {
        let stripped = self.cases.iter().filter_map(|(name, tensor)| Some((name.strip_prefix(prefix)?, tensor)));
        stripped.map(|(name, tensor)| (name.to_owned(), tensor.clone())).collect()
    }

    fn input(&self, prefix: &str) -> DenoiserInput {
        self.family.input(self.below(&format!("{prefix}/input/"))).unwrap()
    }

    fn grids(&self) -> BTreeSet<&str> {
        let grids = self.cases.keys().filter_map(|name| name.split_once('/')).map(|(grid, _)| grid);
        grids.filter(|grid| *grid != "gradient").collect()
    }

    fn resident(&self) -> InMemoryTensors {
        let names = self.canonical.tensors().into_iter().map(|info| info.name);
        names.map(|name| (name.clone(), self.canonical.tensor(&name).unwrap())).collect()
    }

    /// Every stage that the fixture has, and the sample, whose error it gives.
    fn check(&self, grid: &str, (name, plan): (&str, &str)) -> f64 {
        let wanted = self.below(&format!("{grid}/{name}/"));
        let plan: AttentionPlan = plan.parse().unwrap();
        let denoiser = self.family.build(&self.identified.config, &self.canonical, &plan).unwrap();
        let mut state = denoiser.embed(&self.input(grid)).unwrap();
        let what = format!("{} {grid} {name}", self.family.name());
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

    /// Teacher and student of the fixture's gradients, and what they are asked.
    fn trained(&self) -> (TeacherStudent, Batch) {
        let weights = self.resident();
        let plan: AttentionPlan = "clear:r=3".parse().unwrap();
        let recipe = PairSpec { family: self.family, config: &self.identified.config, plan: &plan };
        let batch = Batch { input: self.input("gradient"), target: self.cases["gradient/target"].clone() };
        (TeacherStudent::build(recipe, &weights, &weights).unwrap(), batch)
    }

    /// Ten steps on one batch bring the student nearer to its teacher.
    fn check_learning(&self) {
        let (pair, batch) = self.trained();
        let settings = LossSettings { denoising: 0.0, ..LossSettings::default() };
        let (mut optimizer, mut losses) = (OptimizerState::default(), Vec::new());
        for _ in 0..10 {
            let (loss, gradients) = backward(&pair, &batch, &settings, Activations::Keep).unwrap();
            optimizer.step(Optimizer::default(), 2e-3, pair.masters(), &gradients).unwrap();
            losses.push(loss.total);
        }
        assert!(losses[9] < 0.7 * losses[0], "{}: losses {losses:?}", self.family.name());
    }

    fn check_gradients(&self) {
        let (pair, batch) = self.trained();
        let loss = LossSettings { denoising: 1.0, prediction: 0.5, attention: 0.0, ..LossSettings::default() };
        let (losses, gradients) = backward(&pair, &batch, &loss, Activations::Recompute).unwrap();
        let wanted = self.cases["gradient/losses"].to_vec1::<f32>().unwrap();
        for (got, wanted) in [losses.denoising, losses.prediction].into_iter().zip(wanted) {
            assert!(
                (got as f32 - wanted).abs() <= 1e-4 * wanted,
                "{}: loss {got}, wanted {wanted}",
                self.family.name()
            );
        }
        let gradients: InMemoryTensors = gradients.into_iter().collect();
        let foreign = self.foreign_gradients(&gradients);
        let layers = foreign.iter().filter(|(name, _)| self.cases.contains_key(&format!("gradient/{name}")));
        let mut checked = 0;
        for (name, got) in layers {
            let what = format!("{}: gradient of {name}", self.family.name());
            let wanted = &self.cases[&format!("gradient/{name}")];
            // The softmax does not see what is added to all keys alike, where they are not normed.
            match largest(wanted) < 1e-6 {
                true => assert!(largest(got) < 1e-6, "{what} should be nothing"),
                false => assert_close(&what, got, wanted, GRADIENT_BOUND),
            }
            checked += 1;
        }
        let expected = self.cases.keys().filter(|name| is_gradient(name)).count();
        assert_eq!(checked, expected, "{}: not every gradient was compared", self.family.name());
        assert!(expected >= 4);
    }

    /// Gradients in the names of the layout, where q, k and v may be one.
    fn foreign_gradients(&self, gradients: &InMemoryTensors) -> BTreeMap<String, Tensor> {
        let foreign = self.identified.foreign(&self.identified.layout, gradients).unwrap();
        let names = foreign.tensors().into_iter().map(|info| info.name);
        names.map(|name| (name.clone(), foreign.tensor(&name).unwrap())).collect()
    }
}

/// What a person tells of a file of facebook's: the size of a head, which its tensors do not show.
fn told(config: &Value) -> Value {
    let number = |key: &str| config[key].as_u64().unwrap();
    json!({"attention_head_dim": number("hidden_size") / number("num_heads")})
}

fn largest(tensor: &Tensor) -> f32 {
    tensor.abs().unwrap().flatten_all().unwrap().max(0).unwrap().to_scalar().unwrap()
}

fn is_gradient(name: &str) -> bool {
    name.strip_prefix("gradient/")
        .is_some_and(|rest| !rest.starts_with("input/") && rest != "target" && rest != "losses")
}

/// Compares the streams of a state with what the fixture has of the stage `stage`, and gives how many it has.
fn check_state(what: &str, state: &HiddenState, wanted: &BTreeMap<String, Tensor>, stage: &str) -> usize {
    let raster = state.context.geometry.to_raster(&state.image).unwrap();
    let streams = [("image", Some(&raster)), ("text", state.text.as_ref())];
    let mut compared = 0;
    for (name, got) in streams {
        let of_stage = |key: &&String| key.strip_suffix(&format!("{stage}/{name}")).is_some_and(is_prefix);
        if let Some(key) = wanted.keys().find(of_stage) {
            let got = got.unwrap_or_else(|| panic!("{what} {stage}: there is no {name}"));
            assert_close(&format!("{what} {key}"), got, &wanted[key], BOUND);
            compared += 1;
        }
    }
    compared
}

/// What may stand before a stage's name: nothing, or the list of blocks.
fn is_prefix(text: &str) -> bool {
    text.is_empty() || text.ends_with('.')
}

/// Checks models of a family; the worst error is shown with --nocapture.
fn check(family: &str, models: &[&str]) {
    let mut worst = 0f64;
    for name in models {
        let model = Model::open(family, name);
        let grids = model.grids();
        assert!(grids.len() >= 2, "{family} {name}: grids {grids:?}");
        for grid in grids {
            worst = ATTENTIONS.iter().map(|attention| model.check(grid, *attention)).fold(worst, f64::max);
            let sample = |attention: &str| &model.cases[&format!("{grid}/{attention}/sample")];
            assert!(relative_error(sample("r3"), sample("full")).unwrap() > 1e-3, "the window would not be seen");
        }
    }
    eprintln!("{family}: relative error of the samples up to {worst:.1e}");
}

#[test]
fn dit_is_that_of_diffusers_and_of_facebook() {
    check("dit", &["diffusers", "original"]);
}

#[test]
fn minrf_is_the_original() {
    check("minrf", &["original"]);
}

#[test]
fn pixart_is_that_of_diffusers() {
    check("pixart", &["alpha", "sigma"]);
}

#[test]
fn sd3_is_that_of_diffusers() {
    check("sd3", &["medium", "medium35"]);
}

#[test]
fn sit_is_the_original() {
    check("sit", &["original"]);
}

/// Models whose gradients are there.
const TAUGHT: [(&str, &str); 5] =
    [("dit", "original"), ("minrf", "original"), ("pixart", "sigma"), ("sd3", "medium35"), ("sit", "original")];

#[test]
fn gradients_are_those_of_torch() {
    TAUGHT.iter().for_each(|(family, model)| Model::open(family, model).check_gradients());
}

#[test]
fn every_family_learns() {
    TAUGHT.iter().for_each(|(family, model)| Model::open(family, model).check_learning());
}
