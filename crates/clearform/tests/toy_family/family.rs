//! The toy family: all that a new family has to say, in one file.

use candle_core::{D, DType, Device, Tensor};
use clearform_attention::{Attention, AttentionPlan, Geometry, Qkv, TokenGrid};
use clearform_models::text::TextEncoders;
use clearform_models::{
    Architecture, BlockContext, Conditions, Denoiser, DenoiserInput, DistilledLayer, GuidanceKind, HiddenState,
    InputChannels, ModelFamily, NoiseProcess, PipelineSpec, Prompt, Result, StepIndex,
};
use clearform_weights::TensorSource;
use serde_json::Value;
use std::collections::BTreeMap;
use std::sync::Arc;

pub struct Toy;

struct ToyArchitecture {
    heads: usize,
    input_size: usize,
}

struct ToyTransformer {
    embed: Tensor,
    classes: Tensor,
    projections: [Tensor; 4],
    head: Tensor,
    heads: usize,
    attention: Box<dyn Attention>,
    layers: Vec<String>,
}

const LAYER: &str = "block.attn";
const PROJECTIONS: [&str; 4] = ["to_q", "to_k", "to_v", "to_out"];

impl ModelFamily for Toy {
    fn name(&self) -> &'static str {
        "toy"
    }

    fn parse(&self, config: &Value) -> Result<Box<dyn Architecture>> {
        let count = |key: &str| config[key].as_u64().unwrap_or_default() as usize;
        Ok(Box::new(ToyArchitecture { heads: count("heads"), input_size: count("input_size") }))
    }
}

impl Architecture for ToyArchitecture {
    fn build(&self, source: &dyn TensorSource, plan: &AttentionPlan) -> Result<Box<dyn Denoiser>> {
        let projection = |name: &str| source.tensor(&format!("{LAYER}.{name}.weight"));
        let [query, key, value, out] = PROJECTIONS.map(projection);
        Ok(Box::new(ToyTransformer {
            embed: source.tensor("embed.weight")?,
            classes: source.tensor("classes.weight")?,
            projections: [query?, key?, value?, out?],
            head: source.tensor("head.weight")?,
            heads: self.heads,
            attention: plan.build(LAYER, &|_| Ok(None), source.products())?,
            layers: vec![LAYER.to_owned()],
        }))
    }

    fn parse_input(&self, mut tensors: BTreeMap<String, Tensor>) -> Result<DenoiserInput> {
        let mut take = |name: &str| tensors.remove(name).unwrap();
        let conditions = Conditions { classes: Some(take("class_labels")), ..Conditions::default() };
        let latents = take("hidden_states");
        Ok(DenoiserInput { latents, timestep: take("timestep"), step_index: StepIndex::default(), conditions })
    }

    fn distilled_layers(&self, layer: &str) -> Vec<DistilledLayer> {
        let parameters = PROJECTIONS.map(|name| format!("{layer}.{name}.weight")).to_vec();
        vec![DistilledLayer { name: layer.to_owned(), parameters }]
    }

    fn input_channels(&self) -> InputChannels {
        InputChannels { latents: 1, text: None, pooled: None }
    }

    fn pipeline_spec(&self) -> &dyn PipelineSpec {
        self
    }
}

impl PipelineSpec for ToyArchitecture {
    fn noise_process(&self) -> NoiseProcess {
        NoiseProcess::FlowMatching { time_scale: 1.0 }
    }

    fn guidance_kind(&self) -> GuidanceKind {
        GuidanceKind::ClassifierFree { unconditional: Prompt::Class(2), channels: None }
    }

    fn patch_size(&self) -> usize {
        1
    }

    fn sample_size(&self) -> Option<usize> {
        Some(self.input_size)
    }

    fn encode(&self, prompts: &[Prompt], _: &dyn TextEncoders) -> Result<Conditions> {
        let label = |prompt: &Prompt| match prompt {
            Prompt::Class(class) => *class,
            Prompt::Text(_) => 2,
        };
        let labels = Tensor::from_iter(prompts.iter().map(label), &Device::Cpu)?;
        Ok(Conditions { classes: Some(labels), ..Conditions::default() })
    }
}

impl Denoiser for ToyTransformer {
    fn layer_names(&self) -> &[String] {
        &self.layers
    }

    fn embed(&self, input: &DenoiserInput) -> Result<HiddenState> {
        let (batch, _, height, width) = input.latents.dims4()?;
        let geometry = Geometry::new(vec![TokenGrid::new(height, width).unwrap()]);
        let pixels = input.latents.reshape((batch, height * width, 1))?.to_dtype(DType::F32)?;
        let labels = input.conditions.classes.as_ref().unwrap().to_dtype(DType::U32)?;
        let class = self.classes.index_select(&labels, 0)?.unsqueeze(1)?; // (batch, 1, width)
        let time = input.timestep.to_dtype(DType::F32)?.reshape((batch, 1, 1))?;
        let tokens = pixels.broadcast_matmul(&self.embed.t()?)?.broadcast_add(&class)?.broadcast_add(&time)?;
        Ok(HiddenState {
            image: geometry.to_tiles(&tokens)?,
            text: None,
            attention: None,
            context: Arc::new(BlockContext { conditioning: time, text: None, rotary: None, geometry }),
        })
    }

    fn block(&self, _: usize, state: HiddenState) -> Result<HiddenState> {
        let (batch, tokens, _) = state.image.dims3()?;
        let projected = |weight: &Tensor| -> Result<Tensor> {
            Ok(state.image.broadcast_matmul(&weight.t()?)?.reshape((batch, tokens, self.heads, ()))?)
        };
        let [query, key, value, out] = &self.projections;
        let qkv = Qkv { query: projected(query)?, key: projected(key)?, value: projected(value)? };
        let attended = self.attention.attend(qkv, None, &state.context.geometry)?;
        let image = (&state.image + attended.image.flatten_from(D::Minus2)?.broadcast_matmul(&out.t()?)?)?;
        Ok(HiddenState { image, attention: Some(attended), ..state })
    }

    fn head(&self, state: &HiddenState) -> Result<Tensor> {
        let pixels = state.image.broadcast_matmul(&self.head.t()?)?; // (batch, tokens, 1)
        let geometry = &state.context.geometry;
        let grid = geometry.grids()[0];
        let raster = geometry.to_raster(&pixels)?;
        Ok(raster.reshape((pixels.dim(0)?, 1, grid.height, grid.width))?)
    }
}
