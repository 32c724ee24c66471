//! [`TensorName`]: what the name of a tensor says: the part of the pipeline, the module in it, and the tensor's role there.

/// What a tensor is to its module.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum TensorRole {
    /// The first factor, lora_A.
    Down,
    /// The second factor, lora_B.
    Up,
    /// A term of the bias, scaled as the factors are.
    UpBias,
    /// A number whose ratio to the rank is the scale.
    Alpha,
    /// Norms of the edited weight (DoRA).
    Magnitude,
    /// Factors of a Hadamard product (LoHa).
    HadaW1A,
    HadaW1B,
    HadaW2A,
    HadaW2B,
    /// Factors of a Kronecker product (LoKr), whole or of low rank themselves.
    LokrW1,
    LokrW1A,
    LokrW1B,
    LokrW2,
    LokrW2A,
    LokrW2B,
    /// A difference of the weight, or of the bias.
    Diff,
    DiffBias,
    /// The weight itself.
    SetWeight,
    /// A parameter under its own name, in place of the model's.
    Parameter,
    /// The extents that a widened weight shall have, which its factors tell too.
    Shape,
    /// The middle factor of a convolution in Tucker's form.
    Tucker,
}

/// Endings of names, with the role they tell. The first that fits counts.
const ENDINGS: &[(&str, TensorRole)] = &[
    (".lora_down.weight", TensorRole::Down),
    (".lora_up.weight", TensorRole::Up),
    (".lora_mid.weight", TensorRole::Tucker),
    (".lora_A.weight", TensorRole::Down),
    (".lora_B.weight", TensorRole::Up),
    (".lora_B.bias", TensorRole::UpBias),
    (".lora_A", TensorRole::Down),
    (".lora_B", TensorRole::Up),
    (".lora.down.weight", TensorRole::Down),
    (".lora.up.weight", TensorRole::Up),
    ("_lora.down.weight", TensorRole::Down),
    ("_lora.up.weight", TensorRole::Up),
    (".lora_linear_layer.down.weight", TensorRole::Down),
    (".lora_linear_layer.up.weight", TensorRole::Up),
    (".alpha", TensorRole::Alpha),
    (".dora_scale", TensorRole::Magnitude),
    (".lora_magnitude_vector.weight", TensorRole::Magnitude),
    (".lora_magnitude_vector", TensorRole::Magnitude),
    (".hada_w1_a", TensorRole::HadaW1A),
    (".hada_w1_b", TensorRole::HadaW1B),
    (".hada_w2_a", TensorRole::HadaW2A),
    (".hada_w2_b", TensorRole::HadaW2B),
    (".hada_t1", TensorRole::Tucker),
    (".hada_t2", TensorRole::Tucker),
    (".lokr_w1", TensorRole::LokrW1),
    (".lokr_w1_a", TensorRole::LokrW1A),
    (".lokr_w1_b", TensorRole::LokrW1B),
    (".lokr_w2", TensorRole::LokrW2),
    (".lokr_w2_a", TensorRole::LokrW2A),
    (".lokr_w2_b", TensorRole::LokrW2B),
    (".lokr_t2", TensorRole::Tucker),
    (".diff", TensorRole::Diff),
    (".diff_b", TensorRole::DiffBias),
    (".w_norm", TensorRole::Diff),
    (".b_norm", TensorRole::DiffBias),
    (".set_weight", TensorRole::SetWeight),
    (".reshape_weight", TensorRole::Shape),
];

/// Beginnings of names, with the part of the pipeline that they tell. The first that fits counts; a name with none is of
/// the transformer. T5 is the second encoder in one family and the third in another.
const BEGINNINGS: &[(&str, &str)] = &[
    ("lora_unet_", "transformer"),
    ("lora_transformer_", "transformer"),
    ("lycoris_", "transformer"),
    ("lora_te1_", "text_encoder"),
    ("lora_te2_", "text_encoder_2"),
    ("lora_te3_", "text_encoder_*"),
    ("lora_te_", "text_encoder"),
    ("text_encoders.clip_l.transformer.", "text_encoder"),
    ("text_encoders.t5xxl.transformer.", "text_encoder_*"),
    ("text_encoder.", "text_encoder"),
    ("text_encoder_2.", "text_encoder_2"),
    ("text_encoder_3.", "text_encoder_3"),
    ("base_model.model.", "transformer"),
    ("model.diffusion_model.", "transformer"),
    ("diffusion_model.", "transformer"),
    ("transformer.", "transformer"),
    ("unet.", "transformer"),
];

/// XLabs' names of FLUX's projections: the processor's part, the module that it stands for in double and in single
/// blocks. 1 is the image's and 2 the text's; a single block's qkv are the first rows of its linear1.
const XLABS: &[(&str, &str)] = &[
    (".processor.qkv_lora1", ".img_attn.qkv"),
    (".processor.qkv_lora2", ".txt_attn.qkv"),
    (".processor.proj_lora1", ".img_attn.proj"),
    (".processor.proj_lora2", ".txt_attn.proj"),
    (".processor.qkv_lora", ".linear1"),
    (".processor.proj_lora", ".linear2"),
];

/// A tensor's name, taken apart.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorName {
    /// The part of the pipeline.
    pub component: &'static str,
    /// The module, or the parameter of [`TensorRole::Parameter`].
    pub module: String,
    /// What the tensor is to it.
    pub role: TensorRole,
    /// Whether the tensor has the first rows of the module alone.
    pub first_rows: bool,
}

impl TensorName {
    /// Takes `name` apart; none if it is of no format here.
    pub fn read(name: &str) -> Option<Self> {
        let (component, rest) = part(name);
        if let Some(xlabs) = xlabs(component, rest) {
            return Some(xlabs);
        }
        let rest = without_adapter(rest);
        let ending = ENDINGS.iter().find(|(ending, _)| rest.len() > ending.len() && rest.ends_with(ending));
        let (module, role) = match ending {
            Some((ending, role)) => (&rest[..rest.len() - ending.len()], *role),
            None if is_parameter(&rest) => (rest.as_str(), TensorRole::Parameter),
            None => return None,
        };
        Some(Self { component, module: module.to_owned(), role, first_rows: false })
    }
}

/// The part of the pipeline, and the rest of the name.
fn part(name: &str) -> (&'static str, &str) {
    let found = BEGINNINGS.iter().find_map(|(beginning, part)| Some((*part, name.strip_prefix(beginning)?)));
    found.unwrap_or(("transformer", name))
}

fn xlabs(component: &'static str, name: &str) -> Option<TensorName> {
    let (stem, role) = match name.strip_suffix(".down.weight") {
        Some(stem) => (stem, TensorRole::Down),
        None => (name.strip_suffix(".up.weight")?, TensorRole::Up),
    };
    let (block, module) = XLABS.iter().find_map(|(theirs, module)| Some((stem.strip_suffix(theirs)?, *module)))?;
    Some(TensorName { component, module: format!("{block}{module}"), role, first_rows: module == ".linear1" })
}

/// peft writes the adapter's own name after the factor's: lora_A.default.weight.
fn without_adapter(name: &str) -> String {
    for factor in [".lora_A.", ".lora_B.", ".lora_magnitude_vector."] {
        if let Some((module, rest)) = name.split_once(factor)
            && let Some((_, last)) = rest.rsplit_once('.')
        {
            return format!("{module}{factor}{last}");
        }
    }
    name.to_owned()
}

/// Whether it is a parameter under its own name, as BFL's control LoRAs have norms.
fn is_parameter(name: &str) -> bool {
    let adapts = ["lora", "lokr", "hada", "oft_", "glora"].iter().any(|part| name.contains(part));
    !adapts && [".weight", ".bias", ".scale"].iter().any(|ending| name.ends_with(ending))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_format_is_taken_apart() {
        let cases = [
            (
                "transformer.transformer_blocks.0.attn.to_q.lora_A.weight",
                "transformer",
                "transformer_blocks.0.attn.to_q",
                TensorRole::Down,
            ),
            ("base_model.model.x_embedder.lora_B.default.weight", "transformer", "x_embedder", TensorRole::Up),
            ("base_model.model.x_embedder.lora_B.my.style.bias", "transformer", "x_embedder", TensorRole::UpBias),
            ("transformer.proj_out.lora_magnitude_vector", "transformer", "proj_out", TensorRole::Magnitude),
            ("proj_out.lora_magnitude_vector.default.weight", "transformer", "proj_out", TensorRole::Magnitude),
            (
                "lora_unet_single_blocks_0_linear1.lora_up.weight",
                "transformer",
                "single_blocks_0_linear1",
                TensorRole::Up,
            ),
            (
                "lora_te3_encoder_block_0_layer_0_SelfAttention_q.alpha",
                "text_encoder_*",
                "encoder_block_0_layer_0_SelfAttention_q",
                TensorRole::Alpha,
            ),
            (
                "lora_transformer_transformer_blocks_0_attn_to_q.lora_down.weight",
                "transformer",
                "transformer_blocks_0_attn_to_q",
                TensorRole::Down,
            ),
            ("diffusion_model.img_in.diff_b", "transformer", "img_in", TensorRole::DiffBias),
            (
                "double_blocks.0.img_attn.norm.query_norm.scale",
                "transformer",
                "double_blocks.0.img_attn.norm.query_norm.scale",
                TensorRole::Parameter,
            ),
            ("transformer.a.to_q.lora.down.weight", "transformer", "a.to_q", TensorRole::Down),
            ("transformer.a.processor.to_q_lora.up.weight", "transformer", "a.processor.to_q", TensorRole::Up),
            (
                "double_blocks.4.processor.proj_lora2.down.weight",
                "transformer",
                "double_blocks.4.txt_attn.proj",
                TensorRole::Down,
            ),
        ];
        for (name, component, module, role) in cases {
            let expected = TensorName { component, module: module.to_owned(), role, first_rows: false };
            assert_eq!(TensorName::read(name), Some(expected), "{name}");
        }
        let single = TensorName::read("diffusion_model.single_blocks.4.processor.qkv_lora.up.weight").unwrap();
        assert_eq!((single.module.as_str(), single.first_rows), ("single_blocks.4.linear1", true));
    }

    #[test]
    fn other_names_are_nothing() {
        for name in ["totally.unknown", "a.oft_blocks.weight", "lora_down", ".alpha", "a.glora.weight"] {
            assert_eq!(TensorName::read(name), None, "{name}");
        }
    }
}
