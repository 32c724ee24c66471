//! The estimated cost of images, compared with counts by hand and with published ones.
#![allow(clippy::unwrap_used)]

mod common;

use clearform_layout::{CostEstimate, Inspection};
use common::models::{Dims, Model, SMALL};
use common::{Fake, Flux, TINY, open};
use serde_json::json;

const DEV: Flux = Flux { double: 19, single: 38, heads: 24, head_dim: 128, channels: 64, guidance: true };

fn estimates(source: &Fake, config: &serde_json::Value) -> Vec<CostEstimate> {
    let (identified, canonical) = open(source, config);
    Inspection::new(&identified, &canonical).estimates
}

fn of(model: &Model) -> Vec<CostEstimate> {
    estimates(&model.canonical(), &model.config)
}

fn close(what: &str, counted: f64, expected: f64, allowed: f64) {
    assert!((counted / expected - 1.0).abs() < allowed, "{what}: {counted}, not {expected}");
}

/// w = 3072. A double block has 12 w^2 weights for the image and as many for the text, a single block 12 w^2 for both;
/// the modulations have 12 w^2 and 3 w^2 and are applied once. Attention takes 4 w operations per pair.
#[test]
fn flux_dev_costs_what_a_count_by_hand_gives() {
    let found = estimates(&DEV.diffusers(), &DEV.config());
    let square = 3072.0f64 * 3072.0;
    for (estimate, (side, image)) in found.iter().zip([(1024, 4096.0), (2048, 16384.0), (4096, 65536.0)]) {
        assert_eq!((estimate.side_pixels, estimate.image_tokens, estimate.text_tokens), (side, image as usize, 512));
        let all = image + 512.0;
        let linear = 24.0 * square * (19.0 * all + 38.0 * all) + 2.0 * square * (19.0 * 12.0 + 38.0 * 3.0);
        let full = linear + 57.0 * 4.0 * 3072.0 * all * all;
        close("full", estimate.full_teraflop_per_evaluation, full / 1e12, 1e-3);
        for (clear, per_token) in estimate.clear.iter().zip([193.0, 793.0, 3205.0]) {
            // A disc has this many points inside the image, and fewer at its borders.
            let most = 57.0 * 4.0 * 3072.0 * (image * per_token + 1024.0 * image + 512.0 * 512.0);
            let cost = clear.teraflop_per_evaluation * 1e12;
            assert!(cost <= 1.001 * (linear + most), "{side} {}: {cost}", clear.radius_tokens);
            assert!(cost >= linear + 0.7 * most, "{side} {}: {cost}", clear.radius_tokens);
            close("ratio", clear.full_over_clear, full / cost, 1e-3);
        }
    }
    assert_eq!(found.len(), 4);
    // Six tensors of the state and fourteen of the MLP, whose parts are larger than this image.
    let activations = (6 + 14) * 2 * 3072 * (4096 + 512);
    assert_eq!(found[0].memory_bytes, 23_802_816_640 + activations);
}

/// Peebles and Xie (arXiv 2212.09748, table 9) count 118.64 and 524.60 billion multiplications for DiT-XL/2, of two
/// operations each.
#[test]
fn dit_costs_what_its_authors_print() {
    for (size, printed) in [(32, 118.64), (64, 524.60)] {
        let dims = Dims { depth: 28, heads: 16, head_dim: 72, channels: 4, patch: 2, more: false, ..SMALL };
        let mut model = Model::new("dit", dims);
        (model.config["sample_size"], model.config["num_embeds_ada_norm"]) = (json!(size), json!(1000));
        let found = of(&model);
        assert_eq!((found[0].side_pixels, found[0].text_tokens), (8 * size, 0));
        close("DiT-XL/2", found[0].full_teraflop_per_evaluation * 1e3 / 2.0, printed, 2e-3);
    }
}

/// Weights per token are counted by hand from the shapes of the families' tensors.
#[test]
fn the_cost_of_each_family_follows_from_its_weights() {
    let dims = Dims { depth: 2, ..SMALL };
    let (w, text): (f64, f64) = (24.0, 11.0);
    // Two blocks; the first of SD3's has a second attention, the last no output and no MLP for the text.
    let sd3_image = 2.0 * 12.0 * w * w + 4.0 * w * w + w * 16.0 + 20.0 * w;
    let sd3_text = 12.0 * w * w + 3.0 * w * w + w * text;
    let sd3_attends = 2.0 * w;
    let ffn = 2.0 * w + 8.0;
    let minrf_image = 2.0 * (4.0 * w * w + 3.0 * ffn * w) + w * 2.0 * 2.0 * w / 2.0 + 2.0 * 2.0 * 4.0 * w;
    let minrf_pixel = w / 2.0 * 4.0 * 25.0 + w / 2.0 * w / 2.0 * 25.0;
    let pixart_image = 2.0 * (4.0 + 2.0 + 8.0) * w * w + w * 16.0 + 32.0 * w;
    let pixart_text = 2.0 * 2.0 * w * w + w * text + w * w;
    let cases = [
        // family, image tokens, text tokens, weights per image token, text token and pixel, widths of attention to all
        // tokens, the image and the text
        ("sd3", 64.0, 333.0, [sd3_image, sd3_text, 0.0], [sd3_attends, w, 0.0]),
        ("pixart", 64.0, 120.0, [pixart_image, pixart_text, 0.0], [0.0, 2.0 * w, 2.0 * w]),
        ("minrf", 256.0, 0.0, [minrf_image, 0.0, minrf_pixel], [0.0, 2.0 * w, 0.0]),
    ];
    for (family, image, text, [per_image, per_text, per_pixel], [to_all, to_image, to_text]) in cases {
        let found = of(&Model::new(family, dims));
        let first = &found[0];
        assert_eq!((first.image_tokens as f64, first.text_tokens as f64), (image, text), "{family}");
        let pixels = (first.side_pixels as f64).powi(2);
        let weights = per_image * image + per_text * text + per_pixel * pixels;
        let pairs = to_all * (image + text).powi(2) + to_image * image * image + to_text * image * text;
        // Weights that are applied once per image are left out here.
        let counted = first.full_teraflop_per_evaluation * 1e12;
        let expected = 2.0 * weights + 4.0 * pairs;
        assert!(counted >= expected && counted < expected * 1.01, "{family}: {counted}, not {expected}");
    }
}

/// Only images that the model can generate are listed, and no setting of a hostile file makes a number overflow.
#[test]
fn sizes_are_those_that_a_model_can_generate() {
    let sides = |found: Vec<CostEstimate>| found.into_iter().map(|estimate| estimate.side_pixels).collect::<Vec<_>>();
    assert_eq!(sides(estimates(&TINY.diffusers(), &TINY.config())), [1024, 2048, 4096, 8192]);
    let sized = |family, key: &str, value: u64| {
        let mut model = Model::new(family, SMALL);
        model.config[key] = value.into();
        sides(of(&model))
    };
    assert_eq!(sized("dit", "sample_size", 32), [256, 512, 1024, 2048]);
    assert_eq!(sized("minrf", "input_size", 32), [32, 64, 128, 256]);
    // Position embeddings for 40 tokens of 16 pixels.
    assert_eq!(sized("sd3", "pos_embed_max_size", 40), [128, 256, 512]);
    assert_eq!(sized("dit", "sample_size", 1_000_000), [1 << 15]);
}
