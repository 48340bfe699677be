// What is wider than the page can be scrolled with the keyboard, too.
function focusable() {
  for (const part of document.querySelectorAll(".formula, .md-typeset__scrollwrap, .highlight-ipynb")) {
    if (part.scrollWidth > part.clientWidth) part.tabIndex = 0;
    else part.removeAttribute("tabindex");
  }
}
addEventListener("load", focusable);
addEventListener("resize", focusable);
