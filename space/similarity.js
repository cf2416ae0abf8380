// Similarity that follows the mouse: while it is over a picture of the tab Backbone, canvases over the maps show the
// cosine similarity of all patches to the patch under the mouse. `_data` in backbone_tab.py sends the features.
(() => {
    let text = null, data = null, last = null;
    const bytes = (base64) => Uint8Array.from(atob(base64), (character) => character.charCodeAt(0));

    // Return the maps with normalized features, decoded once for each answer, or null if the maps show something else.
    function read() {
        const next = document.querySelector("#patches [data-patches]")?.dataset.patches ?? null;
        if (next === text) return data;
        [text, last] = [next, null];
        data = next && JSON.parse(next);
        if (!data) return null;
        data.colors = bytes(data.colors);
        for (const map of data.maps) {
            const scales = data.scales[map.of], size = scales.length;
            map.features = Float32Array.from(new Int8Array(bytes(map.codes).buffer), (code, index) => code * scales[index % size]);
            for (let start = 0; start < map.features.length; start += size) {
                const patch = map.features.subarray(start, start + size), length = Math.hypot(...patch) || 1;
                patch.forEach((value, index) => { patch[index] = value / length; });
            }
        }
        return data;
    }

    function clear() {
        last = null;
        document.querySelectorAll("canvas.similarity").forEach((canvas) => canvas.remove());
    }

    function paint(map, row, column) {
        const image = document.querySelector(`#${map.id} img`);
        if (!image) return;
        const query = data.maps.find((one) => one.id === map.of), size = data.scales[map.of].length;
        const place = row(query.rows) * query.columns + column(query.columns);
        const point = query.features.subarray(place * size, (place + 1) * size);
        const values = new Float32Array(map.rows * map.columns);
        for (let patch = 0; patch < values.length; patch++)
            for (let index = 0; index < size; index++) values[patch] += point[index] * map.features[patch * size + index];
        const low = values.reduce((least, value) => Math.min(least, value)), small = new ImageData(map.columns, map.rows);
        values.forEach((value, patch) => {
            const color = 3 * Math.round(255 * Math.min(1, Math.max(0, (value - low) / (1 - low || 1))));
            small.data.set([...data.colors.subarray(color, color + 3), 255], 4 * patch);
        });
        const patches = document.createElement("canvas");
        [patches.width, patches.height] = [map.columns, map.rows];
        patches.getContext("2d").putImageData(small, 0, 0);

        let canvas = image.parentElement.querySelector("canvas.similarity");
        if (!canvas) {
            canvas = image.parentElement.appendChild(document.createElement("canvas"));
            canvas.className = "similarity";
            canvas.style.position = "absolute";
        }
        [canvas.width, canvas.height] = [image.naturalWidth, image.naturalHeight];
        const { offsetLeft: left, offsetTop: top, offsetWidth: width, offsetHeight: height } = image;
        canvas.style.cssText = `position: absolute; pointer-events: none; object-fit: contain;
            left: ${left}px; top: ${top}px; width: ${width}px; height: ${height}px`;
        const pen = canvas.getContext("2d"), under = document.querySelector(`#${map.under} img`);
        pen.imageSmoothingEnabled = false;
        pen.filter = "grayscale(1)";
        if (under) pen.drawImage(under, 0, 0, canvas.width, canvas.height);
        pen.filter = "none";
        pen.globalAlpha = data.opacity;
        pen.drawImage(patches, 0, 0, canvas.width, canvas.height);
        canvas.dataset.place = place;
    }

    document.addEventListener("pointermove", (event) => {
        const image = event.pointerType === "mouse" && event.target.closest?.(":is(#backbone_picture, #map_a, #map_b) img");
        if (!image || !read()) return clear();
        const scale = Math.min(image.clientWidth / image.naturalWidth, image.clientHeight / image.naturalHeight);
        const inside = (at, side, natural) => (at - (side - natural * scale) / 2) / (natural * scale);
        const x = inside(event.offsetX, image.clientWidth, image.naturalWidth);
        const y = inside(event.offsetY, image.clientHeight, image.naturalHeight);
        if (!(x >= 0 && x < 1 && y >= 0 && y < 1)) return clear();
        const row = (rows) => Math.floor(y * rows), column = (columns) => Math.floor(x * columns);
        const place = data.maps.map((map) => [row(map.rows), column(map.columns)]).join();
        if (place === last) return;
        for (const map of data.maps) paint(map, row, column);
        last = place;
    });
    document.addEventListener("load", (event) => event.target.closest?.(".picture") && clear(), true);
})();
