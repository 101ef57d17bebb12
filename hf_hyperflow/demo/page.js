/* What the page does in the browser alone: names of buttons, the camera, folders, pasted images, and the count of right
   classes. Gradio runs this function once. Images always go through the galleries' own file inputs, so the server
   sees nothing new. */
() => {
  "use strict";
  const line = document.querySelector("#said [data-max-images]");
  const MAX_IMAGES = Number(line.dataset.maxImages);
  const MAX_CLASSES = Number(line.dataset.maxClasses);
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];
  const say = (text) => { line.textContent = text; };

  /* Names: Gradio gives the buttons of every gallery and every row the same ones. */
  const setName = (control, name) => {
    if (control.getAttribute("aria-label") !== name) control.setAttribute("aria-label", name);
  };
  const nameControls = () => {
    for (const gallery of all(".hf-gallery")) {
      const label = labelOf(gallery);
      for (const control of all("button[aria-label], input[type=file]", gallery)) {
        const own = control.getAttribute("aria-label") || "";
        if (control.matches(".upload-container")) setName(control, `${label}: Choose images`);
        else if (!own.startsWith(`${label}: `)) setName(control, `${label}: ${own}`);
      }
    }
    all(".hf-remove").forEach((button) => setName(button, `Remove class ${button.id.split("-").pop()}`));
  };
  const labelOf = (gallery) => gallery.querySelector("[data-testid=block-label]")?.textContent.trim()
    || (gallery.id === "queries" ? "New images" : `Images of class ${gallery.id.split("-").pop()}`);
  nameControls();
  const changes = { subtree: true, childList: true, attributes: true, attributeFilter: ["aria-label"] };
  new MutationObserver(nameControls).observe(document.body, changes);

  /* The camera: offered where the browser has one. */
  const lookForCamera = async () => {
    const devices = (await navigator.mediaDevices?.enumerateDevices()) ?? [];
    document.documentElement.classList.toggle("hf-camera", devices.some((device) => device.kind === "videoinput"));
  };
  lookForCamera();
  navigator.mediaDevices?.addEventListener("devicechange", lookForCamera);

  /* Files */
  const isImage = (file) => !file.name.startsWith(".")
    && (file.type.startsWith("image/") || /\.(heic|heif|tiff?|p[gp]m)$/i.test(file.name));
  const until = async (condition, seconds = 60) => {
    for (let tries = 0; tries < 20 * seconds; tries++) {
      const found = condition();
      if (found) return found;
      await new Promise((resolve) => setTimeout(resolve, 50));
    }
    return null;
  };
  const inputOf = (gallery) => gallery.querySelector("input[type=file]");
  const put = async (files, gallery) => {
    if (!files.length) return say("There are no images among these.");
    const input = await until(() => inputOf(gallery));
    if (!input) return;
    const transfer = new DataTransfer();
    files.forEach((file) => transfer.items.add(file));
    input.files = transfer.files;
    input.dispatchEvent(new Event("change", { bubbles: true }));
  };
  /* No more images than are read, however they come. */
  document.addEventListener("change", (event) => {
    const gallery = event.target.matches("input[type=file]") && event.target.closest(".hf-gallery");
    if (!gallery) return;
    const files = [...event.target.files];
    const room = Math.max(0, MAX_IMAGES - all(".thumbnail-item", gallery).length);
    if (files.length <= room) return;
    const taken = room ? `Of these ${files.length}, the first ${room} were taken.` : "There is no room for more.";
    say(`${labelOf(gallery)}: at most ${MAX_IMAGES} images. ${taken}`);
    const transfer = new DataTransfer();
    files.slice(0, room).forEach((file) => transfer.items.add(file));
    event.target.files = transfer.files;
    if (!room) event.stopImmediatePropagation();
  }, true);

  /* Folders: a folder of images is a class, a folder of such folders is all of them. */
  const isFilled = (row) => all(`#images-${row} .thumbnail-item, #images-${row} .progress-text`).length
    || document.querySelector(`#name-${row} :is(input, textarea)`).value;
  const showRow = async (row) => {
    for (let tries = 0; tries < 60; tries++) {
      if (document.getElementById(`images-${row}`)) return;
      document.getElementById("add-class")?.click(); /* Gradio drops a click while it works on the one before */
      await until(() => document.getElementById(`images-${row}`), 1);
    }
  };
  const findRow = async (taken) => {
    for (let row = 1; row <= MAX_CLASSES; row++) {
      await showRow(row);
      if (!taken.has(row) && !isFilled(row)) return row;
    }
    return null;
  };
  const setClassName = (row, name) => {
    const box = document.querySelector(`#name-${row} :is(input, textarea)`);
    box.value = name.slice(0, box.maxLength > 0 ? box.maxLength : undefined);
    box.dispatchEvent(new Event("input", { bubbles: true }));
  };
  const byName = (a, b) => a.localeCompare(b, undefined, { numeric: true });
  const takeFolder = async (found) => {
    const classes = new Map();
    for (const { file, folders } of found) {
      if (!isImage(file) || folders.some((folder) => folder.startsWith(".") || folder === "__MACOSX")) continue;
      const name = folders[folders.length - 1];
      classes.set(name, [...(classes.get(name) ?? []), file]);
    }
    if (!classes.size) return say("There are no images in this folder.");
    const taken = new Set();
    say("");
    for (const name of [...classes.keys()].sort(byName)) {
      const row = await findRow(taken);
      if (row === null) {
        return say(`There is room for ${MAX_CLASSES} classes: ${taken.size} of the ${classes.size} folders were taken.`);
      }
      taken.add(row);
      setClassName(row, name);
      const files = classes.get(name).sort((a, b) => byName(a.name, b.name));
      await put(files, document.getElementById(`images-${row}`));
    }
  };
  const listEntry = async (entry, folders) => {
    if (entry.isFile) return [{ file: await new Promise((done, fail) => entry.file(done, fail)), folders }];
    const reader = entry.createReader();
    const found = [];
    for (;;) { /* a reader gives 100 entries at a time */
      const batch = await new Promise((done, fail) => reader.readEntries(done, fail));
      if (!batch.length) return found;
      for (const inner of batch) found.push(...(await listEntry(inner, [...folders, entry.name])));
    }
  };
  document.addEventListener("click", (event) => {
    if (event.target.closest("#start-again, #example")) say("");
    if (!event.target.closest("#folder")) return;
    const chooser = document.createElement("input");
    Object.assign(chooser, { type: "file", webkitdirectory: true, id: "folder-chooser", hidden: true });
    chooser.addEventListener("change", async () => {
      const files = [...chooser.files];
      chooser.remove();
      await takeFolder(files.map((file) => ({ file, folders: file.webkitRelativePath.split("/").slice(0, -1) })));
    });
    document.getElementById("folder-chooser")?.remove();
    document.body.append(chooser);
    chooser.click();
  });

  /* Dropping, on any gallery or row; a folder also anywhere else. */
  const placeOf = (event) => event.target instanceof Element && event.target.closest(".hf-class, #queries");
  const galleryIn = (place) => place.matches(".hf-gallery") ? place : place.querySelector(".hf-gallery");
  const hasFiles = (event) => event.dataTransfer?.types.includes("Files");
  const mark = (place) => all(".hf-class, #queries").forEach((p) => p.classList.toggle("hf-dragged", p === place));
  document.addEventListener("dragover", (event) => {
    if (!hasFiles(event)) return;
    event.preventDefault();
    mark(placeOf(event));
  }, true);
  document.addEventListener("dragleave", (event) => { if (!event.relatedTarget) mark(null); }, true);
  document.addEventListener("drop", async (event) => {
    if (!hasFiles(event)) return;
    event.preventDefault();
    event.stopImmediatePropagation();
    mark(null);
    const place = placeOf(event);
    const entries = [...event.dataTransfer.items].map((item) => item.webkitGetAsEntry?.()).filter(Boolean);
    const loose = [...event.dataTransfer.files]; /* the event forgets them at the first await */
    const folders = entries.filter((entry) => entry.isDirectory);
    if (!folders.length) return place ? put(loose.filter(isImage), galleryIn(place)) : say("Drop images on a class.");
    const found = [];
    for (const folder of folders) found.push(...(await listEntry(folder, [])));
    if (place?.id === "queries") return put(found.map(({ file }) => file).filter(isImage), place);
    const names = new Set(found.map(({ folders: names }) => names.join("/")));
    if (!place || names.size > 1) return takeFolder(found);
    await put(found.map(({ file }) => file).filter(isImage), galleryIn(place));
    const row = Number(place.id.split("-").pop());
    if (!document.querySelector(`#name-${row} :is(input, textarea)`).value) setClassName(row, folders[0].name);
  }, true);

  /* Pasting, into the gallery or row that was last pointed at or typed in. */
  let last = null;
  const remember = (event) => { last = placeOf(event) || last; };
  document.addEventListener("pointerover", remember);
  document.addEventListener("focusin", remember);
  document.addEventListener("paste", (event) => {
    const files = [...(event.clipboardData?.files ?? [])].filter(isImage);
    if (!files.length) return;
    event.preventDefault();
    const place = last?.isConnected ? last : document.querySelector("#class-1");
    const gallery = galleryIn(place);
    say(`Pasted into ${labelOf(gallery)}.`);
    put(files, gallery);
  });

  /* The right class of a new image: count again. */
  document.addEventListener("change", (event) => {
    if (!event.target.matches(".hf-results select")) return;
    const rows = all(".hf-results tbody tr");
    const right = { all: 0, before: 0, after: 0 };
    for (const row of rows) {
      const truth = row.querySelector("select").value;
      if (truth) right.all++;
      for (const when of ["before", "after"]) {
        const cell = row.querySelector(`.hf-${when}`);
        const isRight = cell.dataset.label === truth;
        cell.dataset.verdict = truth && (isRight ? "right" : "wrong");
        if (isRight) right[when]++;
      }
    }
    for (const [what, count] of Object.entries(right)) {
      document.querySelector(`#results [data-count=${what}]`).textContent = count;
    }
    document.querySelector("#results [data-count=known]").hidden = !right.all;
    document.querySelector("#results [data-count=ask]").hidden = right.all > 0;
  });
}
