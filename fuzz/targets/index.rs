//! A folder of two shards, the beginning of a minRF: the input is its index and, after a line `---`, its config.json.
//! What opens is then inspected as a model of every family.
#![no_main]

use clearform_fuzz::{SCRATCH, halves, read};
use clearform_layout::{Dequantized, Hints, Inspection, Manifests, detect};
use libfuzzer_sys::fuzz_target;
use std::sync::LazyLock;

type Shard<'a> = (&'a str, &'a [(&'a str, &'a [usize])]);

const SHARDS: [Shard; 2] = [
    (
        "model-00001-of-00002.safetensors",
        &[
            ("init_conv_seq.0.weight", &[2, 1, 5, 5]),
            ("x_embedder.weight", &[4, 8]),
            ("y_embedder.embedding_table.weight", &[4, 4]),
        ],
    ),
    (
        "model-00002-of-00002.safetensors",
        &[("layers.0.attention.wq.weight", &[4, 4]), ("layers.0.adaLN_modulation.1.weight", &[24, 4])],
    ),
];

static MANIFESTS: LazyLock<Manifests> = LazyLock::new(|| {
    SHARDS.into_iter().for_each(write);
    Manifests::embedded().expect("the manifests")
});

fn write((file, tensors): Shard) {
    let (mut header, mut end) = (Vec::new(), 0);
    for (name, shape) in tensors {
        let begin = end;
        end += shape.iter().product::<usize>() * 2;
        header.push(format!("{name:?}:{{\"dtype\":\"BF16\",\"shape\":{shape:?},\"data_offsets\":[{begin},{end}]}}"));
    }
    let header = format!("{{{}}}", header.join(","));
    let bytes = [&(header.len() as u64).to_le_bytes(), header.as_bytes(), &vec![0; end]].concat();
    SCRATCH.write(file, &bytes);
}

fuzz_target!(|bytes: &[u8]| {
    let manifests = &*MANIFESTS;
    let [index, config] = halves(bytes);
    SCRATCH.write("model.safetensors.index.json", index);
    SCRATCH.write("config.json", config);
    let Ok(checkpoint) = Dequantized::open(SCRATCH.folder(), manifests) else { return };
    read(&checkpoint);
    for family in manifests.families() {
        let hints = Hints { family: Some(family), ..Hints::default() };
        if let Ok(identified) = detect(&checkpoint, manifests, &hints) {
            let _ = Inspection::new(&identified, &identified.canonical(&checkpoint)).to_string();
        }
    }
});
