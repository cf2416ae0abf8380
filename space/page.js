// An image that is pasted anywhere goes to the upload of the tab that is open, in place of the one that is there.
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
