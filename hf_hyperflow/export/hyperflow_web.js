/* Adapts to classes of your own and classifies images in a browser, with onnxruntime-web: no server computes anything.

   This file lies beside `adapt.onnx`, `predict.onnx`, `weights.bin` and `hyperflow.json`, and does with them what
   `hyperflow_onnx.py` does. `index.html` is a page that uses it. Another page uses it like this:

     import { HyperFlow } from "./hyperflow_web.js";
     const model = await HyperFlow.load();
     const task = await model.adapt(new Map([["cat", [tom, felix]], ["dog", [rex]]])); // images are a File or Blob each
     const [{ ranking, known }] = await task.classify([unknown]); // ranking: [{ label: "cat", score: 0.9 }, ...]
*/

/* The runtime: only files with these digests are run, wherever they come from. */
const VERSION = "1.30.0";
const RUNTIME = {
  "ort.wasm.bundle.min.mjs": "sha384-PLWz+nHEVHpjwBsO0YVdvQj6n5814Iv8E3b8FG0Rp/uIAtjFMCKOpP66iPzedrIG",
  "ort-wasm-simd-threaded.wasm": "sha384-vjBJ1z7qrhkTyYsNqKeF6c7N+nOJSU94czEo+tvZcu8G75JparGq9kB+kTnEUNVM",
};
const CDN = `https://cdn.jsdelivr.net/npm/onnxruntime-web@${VERSION}/dist/`;

/* How many images are classified at a time, and how large an image may be. */
const BATCH_SIZE = 64;
const MAX_MEGAPIXELS = 64;

/** An exported adapter with its backbone. */
export class HyperFlow {
  /** Load the files of an export from a folder; by default the folder of this file. */
  static async load(folder = new URL(".", import.meta.url)) {
    const names = ["hyperflow.json", "adapt.onnx", "predict.onnx", "weights.bin"];
    const loading = names.map((name) => loadFile(folder, name));
    const [ort, settings, adapt, predict, weights] = await Promise.all([loadRuntime(folder), ...loading]);
    const model = new HyperFlow();
    model.ort = ort;
    model.settings = JSON.parse(await settings.text());
    model.sessions = {
      adapt: await createSession(ort, "adapt.onnx", adapt, weights),
      predict: await createSession(ort, "predict.onnx", predict, weights),
    };
    return model;
  }

  /** Learn the classes of a support set: a Map of class names to arrays of images. */
  async adapt(classes) {
    const names = [...classes.keys()];
    const images = [];
    const oneHot = [];
    for (const name of names) {
      const row = names.map((other) => Number(other === name));
      if (!classes.get(name).length) {
        throw new Error(`Class '${name}' has no images. Give it at least one, or remove it.`);
      }
      for (const image of classes.get(name)) {
        images.push(image);
        oneHot.push(...row);
      }
    }
    if (names.length < 2) throw new Error("There are fewer than two classes. Add one: telling them apart is the task.");
    const learned = await this.run("adapt", {
      pixel_values: await this.process(images),
      one_hot: { data: Float32Array.from(oneHot), dims: [images.length, names.length] },
    });
    for (const { data } of Object.values(learned)) {
      if (!data.every(Number.isFinite)) {
        throw new Error("The images make values that are not finite. Look for strange ones among them.");
      }
    }
    return new Task(this, names, learned);
  }

  /** Pixel values `(n, 3, height, width)` of images, as the graphs read them. */
  async process(images) {
    const { preprocessing } = this.settings;
    const dims = [images.length, 3, preprocessing.height, preprocessing.width];
    const data = new Float32Array(dims.reduce((a, b) => a * b));
    for (const [number, image] of images.entries()) {
      const pixels = process(await decode(image), preprocessing);
      data.set(pixels, number * pixels.length);
    }
    return { data, dims };
  }

  /** The outputs of "adapt" or "predict" by their names. */
  async run(graph, inputs) {
    const session = this.sessions[graph];
    const feeds = {};
    for (const name of session.inputNames) {
      const { data, dims } = inputs[name];
      feeds[name] = new this.ort.Tensor("float32", data.slice(), dims); // a copy, which is handed over to the worker
    }
    try {
      return await session.run(feeds);
    } catch (error) {
      throw new Error(`${graph}.onnx failed (${error.message ?? error}). Load this page again, and use fewer images.`);
    }
  }
}

/** What was learned of the classes of one support set. */
export class Task {
  constructor(model, classNames, learned) {
    Object.assign(this, { model, classNames, learned });
  }

  /** For each image its classes with their probabilities, the likeliest first, and how probably it is of one of them
      at all (`known`; null if the export cannot tell). */
  async classify(images) {
    const results = [];
    for (let start = 0; start < images.length; start += BATCH_SIZE) {
      const pixelValues = await this.model.process(images.slice(start, start + BATCH_SIZE));
      const { scores, known } = await this.model.run("predict", { pixel_values: pixelValues, ...this.learned });
      for (let row = 0; row < pixelValues.dims[0]; row++) {
        const offset = row * this.classNames.length;
        const ranking = this.classNames.map((label, number) => ({ label, score: scores.data[offset + number] }));
        ranking.sort((a, b) => b.score - a.score);
        results.push({ ranking, known: known ? known.data[row] : null });
      }
    }
    return results;
  }
}

async function loadFile(folder, name) {
  const answer = await fetch(new URL(name, folder)).catch((error) => ({ ok: false, status: error.message }));
  if (answer.ok) return answer.blob();
  throw new Error(
    `${name} cannot be loaded from beside this page (${answer.status}). ` +
      "Serve the whole folder that 'hyperflow export' wrote."
  );
}

/* onnxruntime-web from the folder ort/ if there is one, else from jsDelivr. */
async function loadRuntime(folder) {
  const [script, binary] = Object.keys(RUNTIME);
  const local = new URL("ort/", folder);
  const isLocal = await fetch(new URL(script, local), { method: "HEAD" }).then((answer) => answer.ok);
  const source = isLocal ? local : CDN;
  const loadPart = async (name) => {
    const answer = await fetch(new URL(name, source), { integrity: RUNTIME[name] });
    if (!answer.ok) throw new Error(answer.status);
    return answer.arrayBuffer();
  };
  try {
    const code = new Blob([await loadPart(script)], { type: "text/javascript" });
    const ort = await import(URL.createObjectURL(code));
    ort.env.wasm.wasmBinary = await loadPart(binary);
    ort.env.wasm.proxy = true; // compute in a worker, so that the page does not freeze
    return ort;
  } catch (error) {
    throw new Error(
      `onnxruntime-web ${VERSION} cannot be loaded from ${source} (${error.message}). Put the files of the folder ` +
        "'dist' of the npm package of exactly this version into a folder 'ort' beside this page."
    );
  }
}

async function createSession(ort, name, graph, weights) {
  const options = { externalData: [{ path: "weights.bin", data: weights }], logSeverityLevel: 3 };
  try {
    return await ort.InferenceSession.create(new Uint8Array(await graph.arrayBuffer()), options);
  } catch (error) {
    const reason = error.message ?? error;
    throw new Error(`${name} cannot be run (${reason}). Export again, and serve all files of one export.`);
  }
}

/** Pixels of an image file, upright, with alpha laid on white. */
export async function decode(file) {
  const name = file.name ?? "An image";
  let bitmap;
  try {
    bitmap = await createImageBitmap(file, { colorSpaceConversion: "none" });
  } catch {
    throw new Error(`${name} cannot be read as an image by this browser. Replace or remove it.`);
  }
  const { width, height } = bitmap;
  if (width * height > MAX_MEGAPIXELS * 1e6) {
    throw new Error(`${name} has more than ${MAX_MEGAPIXELS} megapixels. Make it smaller, or remove it.`);
  }
  const context = new OffscreenCanvas(width, height).getContext("2d", { willReadFrequently: true });
  context.fillStyle = "white";
  context.fillRect(0, 0, width, height);
  context.drawImage(bitmap, 0, 0);
  bitmap.close();
  return context.getImageData(0, 0, width, height);
}

/** Pixel values `(3, height, width)` of a decoded image, as the backbone's image processor makes them.
    The preprocessing is that of `hyperflow.json`; steps that are null are left out. */
export function process(image, { size, resample, crop, scale, mean, std }) {
  if (size !== null) image = resize(image, size, resample);
  const [height, width] = crop ?? [image.height, image.width];
  const left = Math.floor((image.width - width) / 2);
  const top = Math.floor((image.height - height) / 2);
  const pixels = new Float32Array(3 * height * width);
  const { fround } = Math; // numpy computes in 32 bits here
  for (let channel = 0, i = 0; channel < 3; channel++) {
    for (let y = top; y < top + height; y++) {
      for (let x = left; x < left + width; x++, i++) {
        const isInside = x >= 0 && y >= 0 && x < image.width && y < image.height;
        const byte = isInside ? image.data[4 * (y * image.width + x) + channel] : 0; // black beyond the image
        pixels[i] = scale === null ? byte : byte * scale;
        if (mean !== null) pixels[i] = fround(pixels[i] - fround(mean[channel])) / fround(std[channel]);
      }
    }
  }
  return pixels;
}

/* Filters of Pillow by their numbers: how far they reach, and their weight at a distance. */
const sinc = (x) => (x === 0 ? 1 : Math.sin(Math.PI * x) / (Math.PI * x));
const cubic = (x) => (x < 1 ? (1.5 * x - 2.5) * x * x + 1 : -0.5 * (((x - 5) * x + 8) * x - 4));
const FILTERS = {
  1: { reach: 3, weigh: (x) => sinc(x) * sinc(x / 3) }, // Lanczos
  2: { reach: 1, weigh: (x) => 1 - x }, // bilinear
  3: { reach: 2, weigh: cubic }, // bicubic
};

/* Resize to [height, width], or to a length of the shorter side. A canvas would smooth in another way than Pillow. */
function resize(image, size, resample) {
  const filter = FILTERS[resample];
  if (!filter) throw new Error(`This page cannot resize images by Pillow's filter ${resample}. Use hyperflow_onnx.py.`);
  const shorter = Math.min(image.width, image.height);
  const [height, width] = Array.isArray(size)
    ? size
    : [image.height, image.width].map((length) => Math.trunc((size * length) / shorter));
  return resizeAxis(resizeAxis(image, width, true, filter), height, false, filter);
}

/* Resize along one axis. As in Pillow, weights are rounded to 22 bits and sums to bytes: this gives the same bytes. */
function resizeAxis(image, length, isHorizontal, filter) {
  const [before, nLines] = isHorizontal ? [image.width, image.height] : [image.height, image.width];
  if (length === before) return image;
  const [width, height] = isHorizontal ? [length, nLines] : [nLines, length];
  const data = new Uint8ClampedArray(4 * width * height);
  const [step, lineStep, newLineStep] = isHorizontal ? [4, 4 * before, 4 * length] : [4 * nLines, 4, 4];
  for (let position = 0; position < length; position++) {
    const { first, weights } = computeWeights(position, before, length, filter);
    for (let line = 0; line < nLines; line++) {
      for (let channel = 0; channel < 3; channel++) {
        let sum = 2 ** 21;
        let source = line * lineStep + first * step + channel;
        for (let i = 0; i < weights.length; i++, source += step) sum += image.data[source] * weights[i];
        data[line * newLineStep + position * step + channel] = sum >> 22;
      }
    }
  }
  return { data, width, height };
}

/* The weights of the pixels from the first on that make one new pixel. */
function computeWeights(position, before, after, { reach, weigh }) {
  const scale = before / after;
  const blur = Math.max(scale, 1);
  const centre = (position + 0.5) * scale;
  const first = Math.max(0, Math.trunc(centre - reach * blur + 0.5));
  const last = Math.min(before, Math.trunc(centre + reach * blur + 0.5));
  const weights = [];
  for (let i = first; i < last; i++) {
    const distance = Math.abs((i - centre + 0.5) * (1 / blur));
    weights.push(distance < reach ? weigh(distance) : 0);
  }
  const sum = weights.reduce((a, b) => a + b);
  const rounded = weights.map((weight) => Math.trunc((weight / sum) * 2 ** 22 + 0.5 * Math.sign(weight)));
  return { first, weights: rounded };
}
