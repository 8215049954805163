
/* circuitsvis shows a head while the pointer is on its thumbnail, and keeps it after a click. Here
   focus and the Enter and space keys do the same. */
for (const figure of document.querySelectorAll(".card > div")) {
  const mark = () => {
    for (const title of figure.querySelectorAll("h4")) {
      const thumbnail = title.parentElement;
      if (thumbnail.tabIndex === 0) continue;
      const send = (kind) => thumbnail.dispatchEvent(new MouseEvent(kind, { bubbles: true }));
      Object.assign(thumbnail, { tabIndex: 0, role: "button", ariaLabel: title.textContent });
      thumbnail.addEventListener("focus", () => send("mouseover"));
      thumbnail.addEventListener("keydown", (event) => {
        if (event.key !== "Enter" && event.key !== " ") return;
        event.preventDefault();
        send("click");
      });
    }
  };
  new MutationObserver(mark).observe(figure, { childList: true, subtree: true });
  mark();
}
