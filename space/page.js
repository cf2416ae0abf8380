// An image that is pasted anywhere replaces the upload of the open tab.
document.addEventListener("paste", async (event) => {
    const files = event.clipboardData?.files;
    if (!files?.length || event.target.closest?.("textarea, input[type=text]")) return;
    const visible = (element) => element.offsetParent !== null;
    const upload = [...document.querySelectorAll(".image-upload")].find(visible);
    if (!upload) return;
    event.preventDefault();
    let input = upload.querySelector("input[type=file]");
    if (!input) {
        upload.querySelector("button[aria-label=Clear], button[title=Clear]")?.click();
        await new Promise((resolve) => setTimeout(resolve, 300));
        input = upload.querySelector("input[type=file]");
    }
    if (!input) return;
    const transfer = new DataTransfer();
    transfer.items.add(files[0]);
    input.files = transfer.files;
    input.dispatchEvent(new Event("change", { bubbles: true }));
});

// Arrow keys on a map move its point by a patch.
const MOVES = { ArrowLeft: ["#point_x", -1], ArrowRight: ["#point_x", 1], ArrowUp: ["#point_y", -1], ArrowDown: ["#point_y", 1] };
document.addEventListener("keydown", (event) => {
    const move = MOVES[event.key];
    if (!move || !event.target.matches?.(".picture")) return;
    event.preventDefault();
    const number = document.querySelector(`${move[0]} input[type=number]`);
    const patches = Number(document.querySelector("#resolution input[type=number]")?.value) || 16;
    const value = Math.min(100, Math.max(0, Number(number.value) + (move[1] * 100) / patches));
    Object.getOwnPropertyDescriptor(HTMLInputElement.prototype, "value").set.call(number, value.toFixed(1));
    number.dispatchEvent(new Event("input", { bubbles: true }));
});
// A pressed button scrolls a phone to the results that it belongs to.
document.addEventListener("click", (event) => {
    const button = event.target.closest?.("button.run");
    if (!button || window.innerWidth > 640) return;
    let around = button;
    while (around && !around.querySelector(".results")) around = around.parentElement;
    (button.closest(".results") ?? around?.querySelector(".results"))?.scrollIntoView({ behavior: "smooth" });
});

// Errors of earlier actions disappear when the next action starts.
window.fetch = ((send) => (resource, ...options) => {
    if (String(resource.url ?? resource).includes("/queue/join"))
        document.querySelectorAll(".toast-body.error .toast-close").forEach((button) => button.click());
    return send(resource, ...options);
})(window.fetch);

new MutationObserver(() => {
    for (const picture of document.querySelectorAll(".picture:not([tabindex])")) picture.tabIndex = 0;
    // Gradio gives empty components a label, which requires a role.
    for (const empty of document.querySelectorAll("div.empty[aria-label]:not([role])")) empty.setAttribute("role", "img");
}).observe(document, { childList: true, subtree: true });

// Copy the maps of the tab Look inside, side by side, with a link that restores the settings.
async function copyMaps() {
    const draw = async () => {
        let pictures = [...document.querySelectorAll("#maps img")];
        for (const one of pictures) one.loading = "eager"; // Pictures out of sight may not be loaded yet.
        const loaded = Promise.allSettled(pictures.map((one) => one.decode()));
        await Promise.race([loaded, new Promise((resolve) => setTimeout(resolve, 1000))]);
        pictures = pictures.filter((one) => one.naturalWidth);
        const canvas = document.createElement("canvas");
        canvas.width = pictures.reduce((sum, one) => sum + one.naturalWidth, 0);
        canvas.height = Math.max(...pictures.map((one) => one.naturalHeight));
        let left = 0;
        for (const one of pictures) {
            canvas.getContext("2d").drawImage(one, left, 0);
            left += one.naturalWidth;
        }
        return new Promise((resolve) => canvas.toBlob(resolve));
    };
    const link = new Blob([location.href], { type: "text/plain" });
    try {
        await navigator.clipboard.write([new ClipboardItem({ "image/png": draw(), "text/plain": link })]);
        return "Copied";
    } catch {
        return "Copying is not possible here";
    }
}
